"""Who owns a data folder: one process at a time, by a lock that the system drops when that process ends, however."""
from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from edge_runtime.apps.chat.errors import DataInUseError

LOCK_NAME, OWNER_NAME = "chat.lock", "owner.json"


class FolderLock:
    """Held from construction to `release`. `announce` tells others how to reach the owner; only this user may read it.

    Raises DataInUseError, whose `owner` is what the owner announced, where another process holds it.
    """

    def __init__(self, folder: Path):
        self._owner_file = folder / OWNER_NAME
        self._file = open(folder / LOCK_NAME, "a+b")  # noqa: SIM115 (held as long as the lock)
        try:
            _lock(self._file.fileno())
        except OSError:
            self._file.close()
            owner = read_owner(folder)
            pid = f" (process {owner['pid']})" if "pid" in owner else ""
            error = DataInUseError(f"{folder}: another edge-runtime chat{pid} uses this folder. Use its window, close "
                                   f"it, or start this one with --data and another folder.")
            error.owner = owner  # type: ignore[attr-defined]
            raise error from None
        with contextlib.suppress(OSError):  # what an owner that was killed left behind
            self._owner_file.unlink()

    def announce(self, facts: dict[str, Any]) -> None:
        descriptor = os.open(self._owner_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), **facts}, file)

    def release(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._owner_file.unlink()
            self._file.close()  # which drops the lock


def read_owner(folder: Path) -> dict[str, Any]:
    """What the owner announced; empty where it did not."""
    try:
        found = json.loads((folder / OWNER_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
