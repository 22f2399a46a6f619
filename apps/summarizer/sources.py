"""What goes in, one item after the other: documents, or the lines of an OpenAI batch file."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.apps.documents import DocumentError, find_files, read_document
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError

BATCH_SUFFIX = ".jsonl"
READ_PAUSES = (0.1, 0.5)  # seconds before a file that could not be read is tried again
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
MAX_LINE = 16 << 20  # bytes; a longer line is not a request that any context holds


@dataclass(frozen=True)
class Item:
    """A part of the input, and a line of the output. name: a document's path, a request's custom_id. hash: of its
    content. text: of a document; request: a line's JSON object, line: its number from 1; error: why it cannot be
    used, {"code", "message", "line"}."""

    name: str
    hash: bytes
    text: str | None = None
    request: dict[str, Any] | None = None
    line: int | None = None
    error: dict[str, Any] | None = None


class Source(Protocol):
    """batch: the items are requests. created: a time of the input, in seconds."""

    batch: bool
    created: int

    def __iter__(self) -> Iterator[Item]:
        """Reads as it is asked: may run on a thread of its own."""
        ...

    def count(self) -> int:
        """Items, counted without reading them whole."""
        ...


class Files:
    """Documents: files, folders and patterns. skip: what is not one, such as the output."""

    batch = False
    created = 0

    def __init__(self, paths: Iterable[Path], skip: Iterable[Path] = ()):
        self.paths, self.skip = list(paths), list(skip)

    def __iter__(self) -> Iterator[Item]:
        for path in find_files(self.paths, skip=self.skip):
            yield document_item(path)

    def count(self) -> int:
        return sum(1 for _ in find_files(self.paths, skip=self.skip))


def document_item(path: Path | DocumentError) -> Item:
    """A file's text, or why there is none."""
    if isinstance(path, DocumentError):
        return _failed(str(path.path), "unreadable", path.reason)
    try:
        text = _read(path)
    except DocumentError as error:
        return _failed(str(path), "unreadable", error.reason)
    except EdgeRuntimeError as error:
        return _failed(str(path), "unreadable", " ".join(str(error).split()))
    except MemoryError:
        return _failed(str(path), "unreadable", "does not fit the memory")
    return Item(str(path), digest(text.encode("utf-8", "surrogatepass")), text)


def _read(path: Path) -> str:
    """A system that fails to read may do better a moment later; a file that is wrong stays wrong."""
    for pause in READ_PAUSES:
        try:
            return read_document(path).text
        except DocumentError as error:
            if not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, LASTING):
                raise
        time.sleep(pause)
    return read_document(path).text


class BatchLines:
    """Requests, one JSON object a line (https://platform.openai.com/docs/guides/batch): custom_id, method, url, body.
    Empty lines count as lines and are no items. Never more than a line in memory."""

    batch = True

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        for path in self.paths:
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise DocumentError(path, f"cannot be read: {error.strerror or error}") from error
        self.created = int(max((path.stat().st_mtime for path in self.paths), default=0))

    def __iter__(self) -> Iterator[Item]:
        for path in self.paths:
            prefix = f"{path}, " if len(self.paths) > 1 else ""
            for number, raw in _lines(path):
                yield batch_item(raw, number, prefix)

    def count(self) -> int:
        return sum(1 for path in self.paths for _ in _lines(path))


def batch_item(raw: bytes | None, number: int, prefix: str = "") -> Item:
    """A line as an item. raw: None where it was too long to read."""
    place = f"{prefix}line {number}"
    if raw is None:
        return _malformed(place, number, b"", f"longer than {MAX_LINE >> 20} MiB")
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return _malformed(place, number, raw, f"not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return _malformed(place, number, raw, f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return _malformed(place, number, raw, f"not JSON that can be read: {error}")
    if not isinstance(row, dict):
        return _malformed(place, number, raw, f"a JSON object expected, this is {type(row).__name__}")
    name = row.get("custom_id")
    if not isinstance(name, str) or not name:
        return _malformed(place, number, raw, "custom_id must be a string that is not empty", "custom_id")
    if row.get("method", "POST") != "POST":
        return _malformed(place, number, raw, f"method {_shown(row['method'])}: must be POST", "method", name)
    if not isinstance(row.get("url"), str):
        return _malformed(place, number, raw, "url must be a string", "url", name)
    if not isinstance(row.get("body"), dict):
        return _malformed(place, number, raw, "body must be a JSON object", "body", name)
    return Item(name, digest(raw), request=row, line=number)


def source_of(paths: Sequence[Path], skip: Iterable[Path] = ()) -> Source:
    """Batch files where all paths end in .jsonl, documents otherwise. Raises InvalidRequestError for both at once."""
    kinds = {path.suffix.lower() == BATCH_SUFFIX and not path.is_dir() for path in paths}
    if len(kinds) > 1:
        raise InvalidRequestError("paths", [str(path) for path in paths],
                                  f"either OpenAI batch files ({BATCH_SUFFIX}) or documents, not both at once")
    return BatchLines(paths) if kinds == {True} else Files(paths, skip)


def digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=16).digest()


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of the lines that are not empty; None for one too long."""
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE):
            number += 1
            long = len(raw) == MAX_LINE and not raw.endswith(b"\n")
            while long and (more := file.readline(MAX_LINE)) and not more.endswith(b"\n"):
                pass
            if raw.strip():
                yield number, None if long else raw.rstrip(b"\r\n")


def _malformed(place: str, number: int, raw: bytes, reason: str, parameter: str | None = None,
               name: str | None = None) -> Item:
    return Item(place, digest(raw), line=number, error={
        "code": "invalid_line", "message": f"{place}: {reason}", "line": number,
        **({"param": parameter} if parameter else {}), "custom_id": name})


def _failed(name: str, code: str, reason: str) -> Item:
    return Item(name, digest(os.fsencode(name)), error={"code": code, "message": reason})


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
