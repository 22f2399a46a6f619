"""Every error a user can meet: the value, the limit and the mend. Imports nothing, so every room may raise them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EdgeRuntimeError(Exception):
    """Base of all errors of this package. They can be pickled, so they cross from one process to another."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own way would call the constructor, which takes the message's parts, with the message.
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(kind: type[EdgeRuntimeError], args: tuple[Any, ...]) -> EdgeRuntimeError:
    new = OSError.__new__ if issubclass(kind, OSError) else BaseException.__new__  # those that make a kind's memory
    error: EdgeRuntimeError = new(kind, *args)
    error.args = args
    return error


class CorruptModelError(EdgeRuntimeError):
    """A model file breaks its format. `offset` is the byte where it was noticed."""

    def __init__(self, path: object, offset: int, reason: str):
        super().__init__(f"{path}: corrupt at byte {offset}: {reason}. Download or export the file again.")
        self.path, self.offset, self.reason = str(path), offset, reason


class ModelNotFoundError(EdgeRuntimeError, FileNotFoundError):
    """There is no file to open at a model's path."""

    def __init__(self, path: object, reason: str):
        super().__init__(f"{path}: {reason}. Give the path of a .gguf file.")
        self.path, self.reason = str(path), reason


class UnsupportedModelError(EdgeRuntimeError):
    """A well-formed model that this runtime cannot compute. `what` is the architecture, tensor type or feature."""

    def __init__(self, what: str, supported: Sequence[str] = (), mend: str = ""):
        supported = tuple(supported)
        text = f"{what} is not supported"
        if supported:
            text += f" (supported: {', '.join(supported)})"
        super().__init__(text + "." + (f" {mend}" if mend else ""))
        self.what, self.supported, self.mend = what, supported, mend


class ContextLengthError(EdgeRuntimeError, ValueError):
    """A prompt does not fit the context. Nothing is truncated for the caller. `prompt_tokens`, `limit`,
    `max_tokens`: as they were counted."""

    def __init__(self, prompt_tokens: int, limit: int, max_tokens: int = 0):
        wanted = f"{prompt_tokens} prompt tokens" + (f" + {max_tokens} new tokens" if max_tokens else "")
        super().__init__(f"{wanted} exceed the context of {limit} tokens. Shorten the prompt or open the model "
                         f"with a larger context.")
        self.prompt_tokens, self.limit, self.max_tokens = prompt_tokens, limit, max_tokens


class OutOfMemoryError(EdgeRuntimeError, MemoryError):
    """A plan does not fit this machine's memory. `plan` is the plan, printable."""

    def __init__(self, message: str, plan: object = None):
        super().__init__(message if plan is None else f"{message}\n{plan}")
        self.plan = plan


class InvalidRequestError(EdgeRuntimeError, ValueError):
    """A request's value is outside what is allowed: `parameter` is its name, `value` what was given, `limit` what it
    must be."""

    def __init__(self, parameter: str, value: object, limit: str):
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{parameter}={shown}: must be {limit}.")
        self.parameter, self.value, self.limit = parameter, value, limit


class ChatTemplateError(EdgeRuntimeError):
    """The model has no chat template, or its template refused the messages."""


class TokenizerError(EdgeRuntimeError, ValueError):
    """A tokenizer cannot be built from the file, or a token id lies outside the vocabulary."""


class NumericalError(EdgeRuntimeError, ArithmeticError):
    """The model produced NaN logits. The request ends, the engine goes on."""


class CancelledError(EdgeRuntimeError):
    """The request was cancelled before it ended."""


class EngineStoppedError(EdgeRuntimeError):
    """The engine was closed, or its thread ended; `cause` says why. Requests that were running end with it."""

    def __init__(self, cause: object = "it was closed", mend: str = "Open the model again."):
        super().__init__(f"The engine is not running: {cause}. {mend}")
        self.cause = cause


class DeviceError(EdgeRuntimeError):
    """A device or instruction set is missing, or refused to start."""


class PlacementError(DeviceError):
    """Part of a graph would run elsewhere than asked. `nodes`: their names; `provider`: the one that refused them."""

    def __init__(self, graph: str, provider: str, nodes: Sequence[str], elsewhere: str):
        nodes = tuple(nodes)
        shown = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
        super().__init__(f"{provider} does not take {shown} of graph {graph}: {elsewhere} would run it. Use another "
                         f'provider, or device="cpu".')
        self.graph, self.provider, self.nodes, self.elsewhere = graph, provider, nodes, elsewhere


class DeviceLostError(DeviceError):
    """A device went away in the middle of its work; what it held is gone."""


class MissingExtraError(EdgeRuntimeError, ImportError):
    """An optional dependency is not installed. Names the pip command that mends it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {package}: pip install 'edge-runtime[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose


class SessionFileError(EdgeRuntimeError, ValueError):
    """A saved session cannot be used: it is corrupt, or belongs to another model."""

    def __init__(self, path: object, reason: str):
        super().__init__(f"{path}: {reason}.")
        self.path, self.reason = str(path), reason


class CalibrationError(EdgeRuntimeError, ValueError):
    """Thresholds of early exit cannot be promised, or a stored calibration cannot be read. `subject` is what was
    calibrated, or the file."""

    def __init__(self, subject: object, reason: str):
        super().__init__(f"{subject}: {reason}.")
        self.subject, self.reason = str(subject), reason


class NotEnoughTextError(CalibrationError):
    """A text is too short to calibrate on: `have` and `need` count `unit`s, such as tokens."""

    def __init__(self, unit: str, have: int, need: int, why: str):
        super().__init__("calibration text", f"{have} {unit}, of at least {need} that {why}. Add {need - have} {unit} "
                         "or more")
        self.unit, self.have, self.need, self.why = unit, have, need, why


class ProfileError(EdgeRuntimeError, ValueError):
    """A profile of this machine cannot be measured, read or used. `subject` is the file, or the figure that is
    wrong."""

    def __init__(self, subject: object, reason: str):
        super().__init__(f"{subject}: {reason}. Measure anew with: edge-runtime profile --fresh")
        self.subject, self.reason = str(subject), reason


class HubError(EdgeRuntimeError):
    """A model could not be had from the hub: no connection, no such repository or revision, no permission."""

    def __init__(self, name: object, reason: str, mend: str = ""):
        super().__init__(f"{name}: {reason}." + (f" {mend}" if mend else ""))
        self.name, self.reason, self.mend = str(name), reason, mend


class ChecksumError(HubError):
    """A download is not the file that the hub describes; it was deleted. `expected` and `found`: hex digests."""

    def __init__(self, name: object, kind: str, expected: str, found: str):
        super().__init__(name, f"the {kind} of the download is {found}, the hub says {expected}; it was deleted",
                         "Pull it again; where that ends the same way, a proxy or the server changes files on the way.")
        self.expected, self.found = expected, found


class DiskSpaceError(HubError):
    """A download does not fit the disk. `needed` and `free`: bytes."""

    def __init__(self, name: object, folder: object, needed: int, free: int):
        super().__init__(name, f"{needed / 1e6:.1f} MB are needed in {folder}, {free / 1e6:.1f} MB are free",
                         "Make room there, or set HF_HUB_CACHE to a folder on another disk.")
        self.folder, self.needed, self.free = str(folder), needed, free


class NotPulledError(ModelNotFoundError, HubError):
    """A name of the hub whose file is not on this machine. Nothing is downloaded unasked."""

    def __init__(self, name: object, reason: str = "is neither a file nor a model on this machine", mend: str = ""):
        mend = mend or f"Download it with: edge-runtime pull {name}"
        EdgeRuntimeError.__init__(self, f"{name}: {reason}. {mend}")
        self.path = self.name = str(name)
        self.reason, self.mend = reason, mend
