"""One process per output: a locked file that says whose it is."""
from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from edge_runtime.apps.summarizer.errors import LedgerBusyError


class FileLock:
    """Held until `release` or the end of the process, however it ends. Raises LedgerBusyError where it is held."""

    def __init__(self, path: Path):
        self.path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _locked(self._file):
                os.lseek(self._file, 0, os.SEEK_SET)
                owner = os.read(self._file, 200).decode(errors="replace").strip()
                os.close(self._file)
                raise LedgerBusyError(path.with_suffix(""), owner)
            # Its owner may have removed the file between opening and locking it: then it locks nothing.
            with contextlib.suppress(OSError):
                if os.name == "nt" or os.fstat(self._file).st_ino == os.stat(path).st_ino:
                    break
            os.close(self._file)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        if self._file >= 0:
            if os.name != "nt":
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
            os.close(self._file)
            self._file = -1


if sys.platform == "win32":
    import msvcrt

    def _locked(file: int) -> bool:
        """Locks a byte far behind what is written, which stays readable for others."""
        try:
            os.lseek(file, 1 << 20, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
            return True
        except OSError:
            return False
else:
    import fcntl

    def _locked(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False
