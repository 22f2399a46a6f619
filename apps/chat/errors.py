"""What can go wrong with the chat's own data, each with what to do about it."""
from __future__ import annotations

from edge_runtime.errors import EdgeRuntimeError


class ChatDataError(EdgeRuntimeError):
    """Base of the errors of the chat's database and files."""


class DataInUseError(ChatDataError):
    """Another process owns the data folder, or another program holds the database's lock."""


class DiskFullError(ChatDataError):
    """The disk refused a write. Nothing that was saved before is lost."""

    def __init__(self, path: object):
        super().__init__(f"{path}: the disk is full, so this was not saved. Free some space and try again; what was "
                         f"saved before is intact.")
        self.path = str(path)


class DamagedDataError(ChatDataError):
    """The database is not one, or is damaged, or was written by a newer version."""


class NotFoundError(ChatDataError):
    """There is no such conversation, message, folder, preset, attachment or model (any more)."""

    def __init__(self, what: str, key: object):
        super().__init__(f"There is no {what} {key} (any more). Reload the page.")
        self.what, self.key = what, key


class AttachmentError(ChatDataError):
    """A file that cannot be attached: names the file and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class ImportFileError(ChatDataError):
    """A file that is not an export of this chat."""
