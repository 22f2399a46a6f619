"""Models by name: pull from the Hugging Face hub, or a server that speaks its protocol; find, list, remove."""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_runtime.errors import HubError, NotPulledError
from edge_runtime.models import hub_cache, hub_names
from edge_runtime.models.hub_cache import InstalledModel, installed
from edge_runtime.models.hub_names import HubName, RemoteFile

__all__ = ["InstalledModel", "Pulled", "installed", "is_name", "path_of", "pull", "removable", "remove"]

ANSWER_SECONDS = 30  # of the hub, to the question what a repository holds

is_name = hub_names.is_name


@dataclass(frozen=True)
class Pulled:
    """What `pull` did. path: the file. name: what `LLM` takes for it. commit: of the repository. fetched: bytes that
    came over the network now; resumed: bytes that an earlier, broken download had left; nbytes: the file's size."""

    path: Path
    name: str
    file: str
    commit: str
    nbytes: int
    fetched: int = 0
    resumed: int = 0


def path_of(name: str | os.PathLike[str]) -> Path:
    """The file of a pulled model, such as `org/repo:Q4_0`. Nothing is downloaded. Raises NotPulledError, and
    InvalidRequestError for a name that several files fit."""
    return hub_cache.find(hub_names.parse(name)).path


def removable(name: str | os.PathLike[str]) -> list[InstalledModel]:
    """What `remove` would delete. Raises NotPulledError."""
    return hub_cache.removable(hub_names.parse(name))


def remove(name: str | os.PathLike[str]) -> tuple[list[InstalledModel], int]:
    """Delete a pulled model; a name without quantization and revision means all GGUF models of the repository. Returns
    what was removed, and the bytes that are free again. Raises NotPulledError."""
    return hub_cache.remove(hub_names.parse(name))


def pull(name: str | os.PathLike[str], *, revision: str | None = None, offline: bool | None = None,
         token: str | None = None, progress: Callable[[int, int], Any] | None = None,
         say: Callable[[str], Any] | None = None) -> Pulled:
    """Download the GGUF file that a name means, unless it is here; then its hash is checked again.

    name: `org/repo`, `org/repo:Q4_0` or `org/repo:file.gguf`, with `@revision` (branch, tag or commit) where wanted.
    revision: the same, as an argument. offline: use only what is here; None: as HF_HUB_OFFLINE says. token: for private
    repositories; None: HF_TOKEN, or what `hf auth login` stored. progress: called with (bytes there, bytes in all).
    say: called with lines for a person. HF_ENDPOINT names another hub, HF_HUB_CACHE another folder.

    Raises InvalidRequestError (the name fits no file, or several), HubError (no connection, repository, revision or
    permission; a model in several parts), ChecksumError, DiskSpaceError, NotPulledError (offline, and not here).
    """
    from edge_runtime.models import hub_download

    wanted, tell = hub_names.parse(name), say or (lambda text: None)
    if revision is not None:
        wanted = hub_names.parse(str(HubName(wanted.repo, wanted.choice, revision)))
    if offline or (offline is None and _offline_asked()):
        return _found(wanted)
    commit, files = _ask(wanted, token)
    file = _described(wanted, files[hub_names.choose(wanted, files)], commit, token)
    folder = hub_cache.repo_folder(wanted.repo)
    pointer, blob = folder / "snapshots" / commit / file.path, folder / "blobs" / file.etag
    result = Pulled(pointer, _name(wanted, file, files), file.path, commit, file.nbytes)
    there = next((path for path in (pointer, blob) if path.exists()), None)
    if there is not None:
        if hub_download.content_matches(there, file):
            hub_cache.link(folder, blob, commit, file.path, wanted.revision or "main")
            return result
        tell(f"{there}: not what the hub describes any more; downloading it again")
        for path in (pointer, blob):
            path.unlink(missing_ok=True)
    download = hub_download.Download(wanted, file, blob, progress)
    resumed = download.partial.stat().st_size if download.partial.exists() else 0
    tell(f"{file.path}, {file.nbytes / 1e6:.1f} MB" +
         (f", of which {resumed / 1e6:.1f} MB are here" if resumed else ""))
    fetched = download.run(_url(wanted.repo, file.path, commit), _headers(token),
                           waiting=lambda: tell("another process is downloading this file: waiting for it"))
    hub_cache.link(folder, blob, commit, file.path, wanted.revision or "main")
    return Pulled(pointer, result.name, file.path, commit, file.nbytes, fetched, resumed)


def _offline_asked() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _found(name: HubName) -> Pulled:
    """What is here; the hub is not asked."""
    try:
        model = hub_cache.find(name)
    except NotPulledError as error:
        raise NotPulledError(name, "is not on this machine, and the hub is not asked: offline",
                             f"Pull it where there is a connection: edge-runtime pull {name}") from error
    return Pulled(model.path, model.name, model.file, model.commit, model.nbytes)


def _ask(name: HubName, token: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that a revision stands at, and the GGUF files it holds. What a server says becomes part of paths here,
    and is checked first."""
    from huggingface_hub import HfApi, errors

    from edge_runtime.models.hub_download import refused

    try:
        info = HfApi(endpoint=_endpoint(), token=token).model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=ANSWER_SECONDS)
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        refused(name, error)
    except (ValueError, TypeError, KeyError) as error:
        raise HubError(name, f"the server's answer is none of a hub ({error})", "Check HF_ENDPOINT.") from error
    files = {}
    for sibling in info.siblings or []:
        path = PurePosixPath(sibling.rfilename)
        if not hub_names.is_model(sibling.rfilename) or path.is_absolute() or ".." in path.parts or "\\" in str(path):
            continue
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        files[str(path)] = RemoteFile(str(path), sibling.size or 0, sha256, sibling.blob_id)
    if re.fullmatch("[0-9a-f]{40}", info.sha or "") is None:
        raise HubError(name, f"the server names no commit ({info.sha})", "Check HF_ENDPOINT.")
    return str(info.sha), files


def _described(name: HubName, file: RemoteFile, commit: str, token: str | None) -> RemoteFile:
    """The file with size and hash; servers that leave them out of the list say them where the file is."""
    from huggingface_hub import errors, get_hf_file_metadata

    from edge_runtime.models.hub_download import refused

    if not file.etag:
        try:
            facts = get_hf_file_metadata(_url(name.repo, file.path, commit), token=token, timeout=ANSWER_SECONDS)
        except (errors.HTTPError, OSError) as error:
            refused(name, error)
        etag, nbytes = facts.etag or "", facts.size or 0
        file = RemoteFile(file.path, nbytes, etag if len(etag) == 64 else None, etag if len(etag) == 40 else None)
    if not file.nbytes or re.fullmatch("[0-9a-f]{64}" if file.sha256 else "[0-9a-f]{40}", file.etag) is None:
        raise HubError(name, f"the server tells no size and hash of {file.path} that could be checked",
                       "Check HF_ENDPOINT.")
    return file


def _name(name: HubName, file: RemoteFile, files: dict[str, RemoteFile]) -> str:
    """What `LLM` takes for a file: by its quantization where that tells the repository's files apart."""
    quant = hub_names.quant_of(file.path)
    alone = quant is not None and [hub_names.quant_of(path) for path in files].count(quant) == 1
    return str(HubName(name.repo, quant if alone else file.path, name.revision))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _url(repo: str, file: str, commit: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, file, revision=commit, endpoint=_endpoint())


def _headers(token: str | None) -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=token, library_name="edge-runtime")
