"""What is done, in SQLite: every answer of the model, every document's result, and how much of the output is written.

A transaction is as good as done once it is committed, even when the process is killed the moment after. The output is
written before the ledger counts it; whatever a killed process wrote beyond that count is cut off again at the start.
"""
from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.errors import JobError, ManifestError, StorageError
from edge_runtime.apps.summarizer.lock import FileLock

VERSION = 1
DAMAGE = ("not a database", "malformed", "no such column", "has no column")  # as SQLite says it
T = TypeVar("T")
SCHEMA = """
CREATE TABLE IF NOT EXISTS job (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (
    document INTEGER PRIMARY KEY,  -- its place in the output, from 0
    name TEXT NOT NULL, hash BLOB NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('pending', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0, result TEXT, error TEXT, seconds REAL NOT NULL DEFAULT 0,
    target TEXT,  -- the file it was written to, where each has its own
    written INTEGER  -- bytes of the output up to its end; NULL: not written
);
CREATE INDEX IF NOT EXISTS names ON documents (name);
CREATE TABLE IF NOT EXISTS chunks (
    hash BLOB PRIMARY KEY,  -- of what is asked: two documents that ask the same share the answer
    document INTEGER NOT NULL, level INTEGER NOT NULL, chunk INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    attempts INTEGER NOT NULL, answer TEXT, error TEXT
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Entry:
    """A document of the ledger. result: what the model said, error: why there is none; written: see the schema."""

    document: int
    name: str
    hash: bytes
    status: str
    attempts: int
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    seconds: float
    target: str | None
    written: int | None


class Ledger:
    """path: of the file, locked until `close`; None: in memory, and forgotten as it is written. manifest: what the
    answers depend on; a ledger begun with another one is refused. fresh: forget what is there. Used by one thread.

    Raises LedgerBusyError, ManifestError, StorageError.
    """

    def __init__(self, path: Path | None, manifest: Mapping[str, Any], *, fresh: bool = False):
        self.path = path
        self._lock: FileLock | None = None
        self.resumed = False
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(path.with_name(path.name + ".lock"))
                if fresh:
                    for suffix in ("", "-wal", "-shm", "-journal"):
                        path.with_name(path.name + suffix).unlink(missing_ok=True)
            with self._guard():
                # Written now and then, read back at once: a second process is kept out by the lock.
                self._db = sqlite3.connect(str(path) if path else ":memory:", isolation_level=None,
                                           check_same_thread=False)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(SCHEMA)
                self._check({"version": VERSION, **manifest})
                self._db.execute("BEGIN")
        except OSError as error:
            self.close()
            if isinstance(error, StorageError):
                raise
            raise StorageError(path, error.strerror or str(error)) from error
        except BaseException:
            self.close()
            raise

    # The job

    def get(self, key: str) -> Any:
        """A value kept with the job; None where there is none."""
        row = self._one("SELECT value FROM job WHERE key = ?", key)
        return None if row is None else self._read(json.loads, row[0])

    def set(self, key: str, value: Any) -> None:
        self._run("INSERT OR REPLACE INTO job VALUES (?, ?)", key, json.dumps(value))

    def _check(self, manifest: dict[str, Any]) -> None:
        then, now = self.get("manifest"), json.loads(json.dumps(manifest))
        if then is None:
            self.set("manifest", manifest)
            self.set("created", time.time())
        elif not isinstance(then, dict):
            raise self._damaged("its manifest is no object")
        elif isinstance(version := then.get("version"), int) and version > VERSION:
            raise JobError(f"{self.path}: written by a newer version of edge-runtime (ledger {version}, this one knows "
                           f"{VERSION}). Update edge-runtime, give another --out, or start over with --fresh.")
        elif then != now:
            raise ManifestError(self.path, {key: (then.get(key), now.get(key)) for key in {**then, **now}
                                            if then.get(key) != now.get(key)})
        else:
            self.resumed = True

    # Documents

    def entry(self, document: int) -> Entry | None:
        row = self._one("SELECT * FROM documents WHERE document = ?", document)
        if row is None:
            return None
        result, error = (None if value is None else self._read(json.loads, value) for value in row[5:7])
        return Entry(row[0], row[1], row[2], row[3], row[4], result, error, *row[7:])

    def place_of(self, name: str) -> int | None:
        """The first document of that name."""
        row = self._one("SELECT MIN(document) FROM documents WHERE name = ?", ledger_text(name))
        return None if row is None else row[0]

    def place_of_target(self, target: str) -> int | None:
        row = self._one("SELECT MIN(document) FROM documents WHERE target = ?", ledger_text(target))
        return None if row is None else row[0]

    def begin(self, document: int, name: str, digest: bytes) -> None:
        """A document's work starts."""
        self._run("INSERT INTO documents (document, name, hash, status, attempts) VALUES (?, ?, ?, 'pending', 1) "
                  "ON CONFLICT (document) DO UPDATE SET status = 'pending', attempts = attempts + 1, result = NULL, "
                  "error = NULL", document, ledger_text(name), digest)

    def finish(self, document: int, result: dict | None, error: dict | None, seconds: float) -> None:
        self._run("UPDATE documents SET status = ?, result = ?, error = ?, seconds = ? WHERE document = ?",
                  "done" if error is None else "failed", None if result is None else json.dumps(result),
                  None if error is None else json.dumps(error), seconds, document)

    def forget(self, document: int) -> None:
        """Documents from this one on are not what they were; the answers stay, for what is asked again."""
        self._run("DELETE FROM documents WHERE document >= ?", document)

    # Answers

    def answer(self, ask: Ask) -> Answer | None:
        row = self._one("SELECT answer FROM chunks WHERE hash = ? AND status = 'done'", ask.key)
        return None if row is None else self._read(Answer.from_json, row[0])

    def record(self, document: int, ask: Ask, answer: Answer | None, error: str | None = None) -> None:
        """An answer, or a failed attempt."""
        self._run("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (hash) DO UPDATE SET "
                  "status = excluded.status, attempts = attempts + 1, answer = excluded.answer, error = excluded.error",
                  ask.key, document, ask.level, ask.chunk, "failed" if answer is None else "done",
                  None if answer is None else answer.to_json(), error)

    # The output

    @property
    def written(self) -> tuple[int, int]:
        """(documents, bytes) of the output that are sure to be in it."""
        row = self._one("SELECT document + 1, written FROM documents WHERE written IS NOT NULL ORDER BY document DESC "
                        "LIMIT 1")
        return row or (0, 0)

    def write(self, document: int, end: int, target: str | None = None) -> None:
        """A document's part of the output ends at byte `end`."""
        self._run("UPDATE documents SET written = ?, target = ? WHERE document = ?", end,
                  None if target is None else ledger_text(target), document)
        if self.path is None:
            self._run("UPDATE documents SET result = NULL WHERE document = ?", document)
            self._run("DELETE FROM chunks WHERE document = ?", document)

    def unwrite(self, document: int) -> int:
        """The output is to be written again from this document on; returns the byte where it begins."""
        self._run("UPDATE documents SET written = NULL WHERE document >= ?", document)
        return self.written[1]

    # Life

    def commit(self) -> None:
        """What was said so far is kept, whatever happens next."""
        with self._guard():
            if self._db.in_transaction:
                self._db.execute("COMMIT")
            self._db.execute("BEGIN")

    def discard(self) -> None:
        """Close, and remove the file: nothing was done yet."""
        path, self.path = self.path, None
        self.close()
        if path is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Without a commit: what was not committed is forgotten."""
        db, self._db = getattr(self, "_db", None), None  # type: ignore[assignment]
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            with contextlib.suppress(sqlite3.Error):
                db.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _run(self, sql: str, *values: Any) -> None:
        with self._guard():
            self._db.execute(sql, values)

    def _one(self, sql: str, *values: Any) -> Any:
        with self._guard():
            return self._db.execute(sql, values).fetchone()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            said = str(error)
            if any(word in said for word in DAMAGE):
                raise self._damaged(said) from error
            raise StorageError(self.path, f"the ledger cannot be written ({said})") from error


    def _read(self, parse: Callable[[str], T], text: str) -> T:
        try:
            return parse(text)
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def _damaged(self, how: str) -> JobError:
        return JobError(f"{self.path}: this ledger is damaged ({how}). Start over with --fresh.")


def ledger_text(text: str) -> str:
    """A name as it is kept: SQLite holds no lone surrogates, which file names and JSON may have."""
    return text.encode("utf-8", "backslashreplace").decode()
