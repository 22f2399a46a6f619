"""The database: opened, migrated, and written in transactions whose failures say what to do."""
from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.apps.chat.errors import ChatDataError, DamagedDataError, DataInUseError, DiskFullError
from edge_runtime.apps.chat.lock import FolderLock
from edge_runtime.apps.chat.schema import MIGRATIONS

DATABASE_NAME = "chat.sqlite3"
BUSY_SECONDS = 5.0  # how long another program, a backup say, may hold the database's lock


class Store:
    """The chat's SQLite database in `folder`, which is made if it is not there and owned as long as this is open.

    One connection behind one lock: writes take about a millisecond. WAL with synchronous=NORMAL: whatever was
    committed survives the death of the process at any point.
    Raises DataInUseError, DamagedDataError, DiskFullError, and OSError where the folder cannot be made.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder, self.path = folder, folder / DATABASE_NAME
        self.lock = FolderLock(folder)
        self._mutex = threading.RLock()
        self._depth = 0
        try:
            with self._translated():
                self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None,
                                                   check_same_thread=False)
                self._connection.row_factory = sqlite3.Row
                if os.name != "nt":
                    os.chmod(self.path, 0o600)
                self._open()
        except BaseException:
            with contextlib.suppress(AttributeError):
                self._connection.close()
            self.lock.release()
            raise

    def _open(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA foreign_keys = ON")
        version = run("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise DamagedDataError(f"{self.path}: written by a newer version (schema {version}, this one knows "
                                   f"{len(MIGRATIONS)}). Update edge-runtime, or use --data with another folder.")
        if version == 0 and run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise DamagedDataError(f"{self.path}: a database of another program. Use --data with another folder.")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;")
        # Whoever streamed is gone: this process has only begun, and owns the folder.
        run("UPDATE messages SET status = 'interrupted' WHERE status = 'streaming'")

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with self._mutex, self._translated():
            return [dict(row) for row in self._connection.execute(sql, values)]

    def row(self, sql: str, *values: Any) -> dict[str, Any] | None:
        found = self.rows(sql, *values)
        return found[0] if found else None

    def write(self, sql: str, *values: Any) -> int:
        """One statement, in the transaction that is open or in its own: the rowid it inserted."""
        with self.transaction():
            return self._connection.execute(sql, values).lastrowid or 0

    def changed(self, sql: str, *values: Any) -> int:
        """The same: how many rows it changed."""
        with self.transaction():
            return self._connection.execute(sql, values).rowcount

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, also after a kill. Transactions inside it are part of it."""
        with self._mutex, self._translated():
            if self._depth:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def close(self) -> None:
        with self._mutex:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA optimize")
            self._connection.close()
        self.lock.release()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._meaning(error) from error

    def _meaning(self, error: sqlite3.Error) -> ChatDataError:
        text = str(error)
        if "disk is full" in text or "disk I/O" in text:
            return DiskFullError(self.path)
        if "locked" in text or "busy" in text:
            return DataInUseError(f"{self.path}: another program has locked the database for more than "
                                  f"{BUSY_SECONDS:.0f} s. Close it (a backup or a database browser?) and try again.")
        if isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text):
            return DamagedDataError(f"{self.path}: damaged ({text}). Move the file away to begin anew, or restore it "
                                    f"from a backup.")
        if "readonly" in text or "unable to open" in text:
            return ChatDataError(f"{self.path}: cannot be written ({text}). Check the folder's permissions, or use "
                                 f"--data with another one.")
        return ChatDataError(f"{self.path}: {text}")
