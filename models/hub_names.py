"""Names of models on a hub, `org/repo:Q4_0@revision`, and which GGUF file of a repository such a name means."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from edge_runtime.errors import HubError, InvalidRequestError

# The order in which one is taken where none is named: 4 bits as the kernels like them best, then the next larger,
# then floats. Types that this runtime does not compute (IQ*, Q2_K, Q3_K) are taken only when named.
PREFERRED = ("Q4_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q5_0", "Q5_K_M", "Q5_K_S", "Q5_1", "Q6_K", "Q8_0", "BF16", "F16",
             "F32")
NO_MODELS = ("mmproj", "imatrix")  # projectors of images and statistics for quantizers: GGUF files, but no models

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?::(?P<choice>[^@:\s/][^@:\s]*))?"
                   r"(?:@(?P<revision>\w[\w./+-]*))?")
_PREFIX = re.compile(r"^(?:hf:/+|(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/)")
_QUANT = re.compile(r"(?:^|[-._ ])((?:UD[-_])?(?:I?Q[1-8]_K(?:_(?:XXS|XS|S|M|L|XL))?|Q[4-8]_[01](?:_\d_\d)?|"
                    r"IQ[1-4]_(?:XXS|XS|S|M|NL|XL)|TQ[12]_0|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))(?=$|[-._ ])",
                    re.IGNORECASE)
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class HubName:
    """repo: `org/name`. choice: a quantization such as Q4_0, or a file of the repository; None: the preferred one.
    revision: branch, tag or commit; None: `main` to the hub, whatever is there to this machine."""

    repo: str
    choice: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return (self.repo + (f":{self.choice}" if self.choice else "")
                + (f"@{self.revision}" if self.revision else ""))


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. sha256: of its content, where it is kept as LFS; blob_id: git's hash of it (of the LFS
    pointer, where it is one)."""

    path: str
    nbytes: int
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def etag(self) -> str:
        """What the hub and its caches call this content."""
        return self.sha256 or self.blob_id or ""


def parse(name: str | os.PathLike[str]) -> HubName:
    """`org/repo`, `org/repo:QUANT`, `org/repo:file.gguf`, each with `@revision` where wanted, also behind `hf.co/`.
    Raises InvalidRequestError."""
    text = name.as_posix() if isinstance(name, PurePath) else os.fspath(name)
    found = _NAME.fullmatch(_PREFIX.sub("", text.strip()))
    if found is None or ".." in text or "--" in found["repo"]:
        raise InvalidRequestError("model", text, "a name such as org/repo, org/repo:Q4_0 or org/repo:file.gguf, with "
                                                 "@revision where wanted")
    return HubName(found["repo"], found["choice"], found["revision"])


def is_name(text: str) -> bool:
    """Whether a text that names no file here may be the name of a model on the hub."""
    found = _NAME.fullmatch(_PREFIX.sub("", text))
    return (found is not None and "/" in found["repo"] and ".." not in text and "--" not in found["repo"]
            and not found["repo"].lower().endswith(".gguf"))


def quant_of(path: str) -> str | None:
    """The quantization that a file's name tells (its folder's where it does not): Q4_K_M of `model-q4_k_m.gguf`."""
    parts = PurePath(path).parts
    for part in (re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", parts[-1], flags=re.IGNORECASE), *reversed(parts[:-1])):
        found = _QUANT.findall(part)
        if found:
            return re.sub("^FP", "F", str(found[-1]).upper().replace("UD_", "UD-"))
    return None


def is_model(path: str) -> bool:
    """Whether a path of a repository is a model in GGUF."""
    name = PurePath(path).name.lower()
    return name.endswith(".gguf") and not any(word in name for word in NO_MODELS)


def parts_of(path: str) -> int:
    """How many files a model is split into: 3 for `model-00001-of-00003.gguf`."""
    found = _SHARD.match(PurePath(path).name)
    return int(found["parts"]) if found else 1


def choose(name: HubName, files: Iterable[str]) -> str:
    """The one file of a repository that a name means. Raises InvalidRequestError, with the choices, where there is none
    or more than one; HubError where the repository has no GGUF file, or this one is in several parts."""
    models = sorted(file for file in files if is_model(file))
    if not models:
        raise HubError(name, "the repository has no GGUF model",
                       "Look for one whose name ends in -GGUF. Of a downloaded folder of safetensors, edge-runtime "
                       "quantize makes a GGUF file.")
    found = matching(name, models)
    if not found:
        raise InvalidRequestError("model", str(name), f"one of what {name.repo} has: {_choices(name, models)}")
    if len(found) > 1:
        raise ambiguous(name, found)
    picked = found[0]
    if parts_of(picked) > 1:
        whole = [file for file in models if parts_of(file) == 1]
        raise HubError(name, f"{picked} is one of {parts_of(picked)} parts, and this runtime opens models in one file",
                       (f"In one file there is: {_choices(name, whole)}. " if whole else "") +
                       "Or download the parts and join them with: llama-gguf-split --merge FIRST-PART OUTPUT")
    return picked


def matching(name: HubName, models: list[str]) -> list[str]:
    """Those of a repository's models that a name may mean, each by its first part; without a choice, those of the most
    preferred quantization."""
    if name.choice is not None and name.choice.lower().endswith(".gguf"):
        return _first_parts([file for file in models if file == name.choice] or
                            [file for file in models if PurePath(file).name == name.choice])
    if name.choice is not None:
        wanted = re.sub("^FP", "F", name.choice.upper())
        return _first_parts([file for file in models if quant_of(file) == wanted])
    every = _first_parts(models)
    for quant in PREFERRED if len(every) > 1 else ():
        found = [file for file in every if quant_of(file) == quant and parts_of(file) == 1]
        if found:
            return found
    return every


def ambiguous(name: HubName, found: list[str]) -> InvalidRequestError:
    """The error for a name that means several files."""
    return InvalidRequestError("model", str(name), f"one file, and it means {len(found)}; say which: "
                                                   + _listed([f"{name.repo}:{file}" for file in found]))


def _first_parts(models: list[str]) -> list[str]:
    """One path per model: of one in parts, its first."""
    seen: dict[str, str] = {}
    for file in models:
        found = _SHARD.match(PurePath(file).name)
        seen.setdefault(str(PurePath(file).with_name(found["stem"])) if found else file, file)
    return list(seen.values())


def _choices(name: HubName, models: list[str]) -> str:
    """What may stand behind the colon: quantizations where they tell the files apart, else files."""
    whole = _first_parts(models)
    quants = [quant_of(file) for file in whole]
    return _listed([f"{name.repo}:{quant if quant and quants.count(quant) == 1 else file}"
                    for quant, file in zip(quants, whole)])


def _listed(names: list[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
