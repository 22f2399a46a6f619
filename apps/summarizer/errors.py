"""What can go wrong with a whole job, rather than with one document."""
from __future__ import annotations

from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError

FULL = ("No space", "full", "too large", "quota", "I/O error")  # as systems and SQLite say it


class JobError(EdgeRuntimeError):
    """A job cannot start or go on; what is done so far is kept in its ledger."""


class LedgerBusyError(JobError):
    """Another process works on this ledger."""

    def __init__(self, path: object, owner: str):
        super().__init__(f"{path}: another process{f' ({owner})' if owner else ''} works on this output. Wait for its "
                         f"end, or give another --out.")
        self.path, self.owner = str(path), owner


class ManifestError(JobError):
    """An output was begun with another model, other options or prompts. differences: name -> (then, now)."""

    def __init__(self, path: object, differences: dict[str, tuple[object, object]]):
        told = "; ".join(f"{name}: {_short(then)} then, {_short(now)} now" for name, (then, now) in differences.items())
        super().__init__(f"{path}: this output was begun with other settings ({told}). Use those, give another --out, "
                         f"or start over with --fresh.")
        self.path, self.differences = str(path), differences


class StorageError(JobError, OSError):
    """Ledger or output cannot be written: a full disk, mostly."""

    def __init__(self, path: object, reason: str):
        mend = "make room" if any(word in reason for word in FULL) else "let it be written there"
        EdgeRuntimeError.__init__(self, f"{path}: {reason}. What is done is kept: {mend}, and give the same command "
                                        f"again; it goes on where it was.")
        self.path, self.reason = str(path), reason


class ServersUnreachableError(JobError):
    """No server answers any more."""

    def __init__(self, urls: list[str], seconds: float, reason: str):
        super().__init__(f"no server answered for {seconds:.0f} s ({', '.join(urls)}; the last said: {reason}). What "
                         f"is done is kept: start the servers, and give the same command again.")
        self.urls, self.reason = urls, reason


class ServerError(EdgeRuntimeError):
    """A server failed at a request; another time, or another server, may do better."""


class RequestRefusedError(InvalidRequestError):
    """A server refused a request for what it says; asking again would not help."""

    def __init__(self, message: str):
        EdgeRuntimeError.__init__(self, message)
        self.parameter, self.value, self.limit = "request", None, message


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
