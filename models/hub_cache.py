"""Models from a hub on this machine. The folder is the one that huggingface_hub and its friends share:
`models--org--name/{blobs/ETAG, snapshots/COMMIT/FILE -> blob, refs/BRANCH}`. Imports nothing heavy, needs no net."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import NotPulledError
from edge_runtime.models import hub_names
from edge_runtime.models.hub_names import HubName, is_model, parts_of, quant_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class InstalledModel:
    """A GGUF file that was pulled, or left in the shared cache by another tool.

    name: what `LLM(name)` and the commands take. quant: as the file's name tells it, or None. file: its path in the
    repository. commit: of the repository. path: where it is. nbytes: its size. modified: seconds since 1970.
    """

    name: str
    repo: str
    quant: str | None
    file: str
    commit: str
    path: Path
    nbytes: int
    modified: float


def cache_folder() -> Path:
    """HF_HUB_CACHE, else HF_HOME/hub, else huggingface/hub in the user's cache folder."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"),
                            ("XDG_CACHE_HOME", "huggingface/hub")):
        value = os.environ.get(variable)
        if value:
            return Path(os.path.expandvars(value)).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


def repo_folder(repo: str) -> Path:
    """Where a repository's blobs and snapshots are."""
    return cache_folder() / ("models--" + repo.replace("/", "--"))


def installed(repo: str | None = None) -> list[InstalledModel]:
    """Every model on this machine that came from a hub (of one repository, where named), by name. Of a file that
    several commits hold with the same content, the one of `main`. Parts of split models are left out: this runtime
    does not open them."""
    folders = [repo_folder(repo)] if repo else sorted(cache_folder().glob("models--*"))
    return sorted((model for folder in folders for model in _models_of(folder)), key=lambda model: model.name.lower())


def find(name: HubName) -> InstalledModel:
    """The one file on this machine that a name means, with the rules of `hub_names.choose`. Raises NotPulledError, and
    InvalidRequestError where several fit."""
    commit = name.revision and _commit_of(name)
    here = list(_models_of(repo_folder(name.repo), commit)) if commit else installed(name.repo)
    # Files of the newest commit stand for those of the same name in older ones.
    files = {model.file: model for model in sorted(here, key=lambda model: "@" not in model.name)}
    found = hub_names.matching(name, sorted(files))
    if not found:
        others = ", ".join(model.name for model in here)
        raise NotPulledError(name, f"is not on this machine; of {name.repo} there is {others}" if others else
                             "is neither a file nor a model on this machine")
    if len(found) > 1:
        raise hub_names.ambiguous(name, found)
    return files[found[0]]


def removable(name: HubName) -> list[InstalledModel]:
    """What `remove` would delete. Raises NotPulledError."""
    if name.choice is None and name.revision is None:
        return list(_models_of(repo_folder(name.repo), every=True))
    return [find(name)]


def remove(name: HubName) -> tuple[list[InstalledModel], int]:
    """Delete the file that a name means; without quantization and revision, all GGUF models of its repository, and
    downloads of it that never ended. Returns what was removed, and how many bytes that freed: content that another
    commit still points at stays. Raises NotPulledError."""
    folder = repo_folder(name.repo)
    whole = name.choice is None and name.revision is None
    gone = removable(name)
    unfinished = list(folder.glob("blobs/*.incomplete")) if whole else []
    if not gone and not unfinished:
        raise NotPulledError(name, mend="What is here: edge-runtime models list")
    before, blobs = _nbytes(folder), set()
    for model in gone:
        if model.path.is_symlink():
            blobs.add(_target(model.path))
        model.path.unlink()
    used = {_target(path) for path in folder.glob("snapshots/**/*") if path.is_symlink()}
    for blob in [*(blobs - used), *unfinished]:
        if blob.parent == folder / "blobs":
            blob.unlink(missing_ok=True)
    freed = before - _nbytes(folder)
    _forget_if_empty(folder)
    return gone, freed


def link(folder: Path, blob: Path, commit: str, file: str, revision: str) -> Path:
    """Make a finished blob the snapshot's file, and note the commit that a branch or tag stood at."""
    pointer = folder / "snapshots" / commit / file
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not _COMMIT.fullmatch(revision):
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    if not blob.exists():  # the pointer is the file itself, see below
        return pointer
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # Windows without the right to make links, and file systems that know none
        os.replace(blob, pointer)
    return pointer


def _models_of(folder: Path, commit: str | None = None, every: bool = False) -> Iterator[InstalledModel]:
    """commit: only that one. every: each commit's file, even where the content is that of another's."""
    repo = folder.name.removeprefix("models--").replace("--", "/")
    refs = _refs(folder)
    main = refs.get("main")
    snapshots = sorted((one for one in folder.glob("snapshots/*") if one.is_dir()), reverse=True,
                       key=lambda one: (one.name == main, one.name in refs.values(), one.stat().st_mtime))
    seen: dict[str, Path] = {}
    for snapshot in snapshots:
        if commit is not None and snapshot.name != commit:
            continue
        paths = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*.gguf"))}
        whole = {file: path for file, path in paths.items()
                 if is_model(file) and parts_of(file) == 1 and path.is_file()}
        quants = [quant_of(file) for file in whole]
        for file, path in whole.items():
            content = path.resolve()
            if not every and seen.get(file) == content:
                continue
            quant = quant_of(file)
            choice = quant if quant and quants.count(quant) == 1 else file
            name = HubName(repo, choice, snapshot.name[:12] if file in seen or commit else None)
            seen.setdefault(file, content)
            facts = content.stat()
            yield InstalledModel(str(name), repo, quant, file, snapshot.name, path, facts.st_size, facts.st_mtime)


def _refs(folder: Path) -> dict[str, str]:
    """Branch or tag -> commit, as they were when something was pulled."""
    root, found = folder / "refs", {}
    for path in root.rglob("*"):
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.read_text(errors="replace").strip()
    return found


def _commit_of(name: HubName) -> str:
    """The commit of a name's revision, as far as it is known here."""
    folder, revision = repo_folder(name.repo), name.revision or "main"
    found = _refs(folder).get(revision)
    if found is None and _SHORT_COMMIT.fullmatch(revision):
        fitting = [one.name for one in folder.glob("snapshots/*") if one.name.startswith(revision)]
        found = fitting[0] if len(fitting) == 1 else None
    if found is None:
        raise NotPulledError(name)
    return found


def _target(pointer: Path) -> Path:
    """What a link names, one step far: an entry in blobs/ may itself be a link, into a store that others share."""
    return Path(os.path.normpath(pointer.parent / os.readlink(pointer)))


def _nbytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _forget_if_empty(folder: Path) -> None:
    """Remove empty folders, and the whole repository where no content is left."""
    def deepest_first() -> list[Path]:
        return sorted(folder.rglob("*"), key=lambda path: -len(path.parts))

    for path in deepest_first():
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
    if folder.is_dir() and not (folder / "snapshots").exists() and not (folder / "blobs").exists():
        shutil.rmtree(folder, ignore_errors=True)
