"""What comes out, in the order of the input: JSON lines, one Markdown file per document, OpenAI batch output."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

from edge_runtime.apps.summarizer.errors import StorageError
from edge_runtime.apps.summarizer.ledger import Entry

MAX_NAME = 220  # bytes; file systems take 255, and ".md.part" and a number come behind
FORMATS = ("jsonl", "markdown", "batch")


@dataclass(frozen=True)
class Facts:
    """What a line tells beside its document: batch: the input was requests; created: seconds; model: its name."""

    batch: bool = False
    created: int = 0
    model: str = ""


class Output(Protocol):
    """`write` may be called again for a document after the process was killed: what it wrote then does not count."""

    def open(self, end: int) -> bool:
        """Go on at byte `end`; False where less than that is there, and all is to be written again from 0."""
        ...

    def write(self, entry: Entry) -> tuple[int, str | None]:
        """(bytes of the output up to here, the file it is in where each has its own)."""
        ...

    def flush(self) -> None:
        """What was written is with the system now: a kill does not take it away."""
        ...

    def close(self) -> None: ...


class LinesOutput:
    """A file of lines, or standard output, which cannot go back. render: an entry's JSON object."""

    def __init__(self, path: Path | None, render: Callable[[Entry], dict], stdout: BinaryIO | None = None):
        self.path, self.render = path, render
        self._file, self._end = stdout, 0

    def open(self, end: int) -> bool:
        if self.path is None:
            return end == 0
        with self._guarded():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115 closed by close()
            self._file = file
            size = file.seek(0, os.SEEK_END)
            self._end = end if size >= end else 0
            file.seek(self._end)
            file.truncate()
        return self._end == end

    def write(self, entry: Entry) -> tuple[int, str | None]:
        assert self._file is not None
        line = json_line(self.render(entry))
        with self._guarded():
            self._file.write(line)
        self._end += len(line)
        return self._end, None

    def flush(self) -> None:
        assert self._file is not None
        with self._guarded():
            self._file.flush()

    def close(self) -> None:
        if self.path is not None and self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # flush() has told of it
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(OSError):
                file.close()

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(self.path or "standard output", error.strerror or str(error)) from error


class NoOutput:
    """For callers who take the entries as they come."""

    def open(self, end: int) -> bool:
        return True

    def write(self, entry: Entry) -> tuple[int, str | None]:
        return entry.document + 1, None

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class MarkdownOutput:
    """A folder with a file per document, each written whole or not at all. taken: whether another document has a
    target already."""

    def __init__(self, folder: Path, facts: Facts, taken: Callable[[str, int], bool]):
        self.folder, self.facts, self._taken = folder, facts, taken

    def open(self, end: int) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(self.folder, error.strerror or str(error)) from error
        return True

    def write(self, entry: Entry) -> tuple[int, str | None]:
        target = self._target(entry)
        path = self.folder / target
        partial = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(_markdown(entry).encode("utf-8", "backslashreplace"))
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise StorageError(path, error.strerror or str(error)) from error
        return entry.document + 1, target

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _target(self, entry: Entry) -> str:
        """A path below the folder that no other document has."""
        pure = PurePath(entry.name)
        parts = [part for part in pure.parts if part not in (pure.anchor, "..", ".")] or ["document"]
        if self.facts.batch:
            parts = ["".join(c if c.isalnum() or c in "-_." else "_" for c in entry.name).lstrip(".")[:150] or "line"]
        plain = "/".join(map(_short, parts))
        target, number = f"{plain}.md", 1
        while self._taken(target, entry.document):
            number += 1
            target = f"{plain}-{number}.md"
        return target


def _short(name: str) -> str:
    """A file's name that has room for suffixes: one too long is cut, and told apart by a digest."""
    raw = name.encode("utf-8", "backslashreplace")
    if len(raw) <= MAX_NAME:
        return name
    return f"{raw[:MAX_NAME - 17].decode('utf-8', 'ignore')}-{blake2b(raw, digest_size=8).hexdigest()}"


def renderer(form: str, facts: Facts) -> Callable[[Entry], dict]:
    """Entry -> JSON object of a line."""
    if form == "batch":
        return lambda entry: _batch_row(entry, facts)
    return _request_row if facts.batch else _document_row


def json_line(row: dict) -> bytes:
    """A line of UTF-8; lone surrogates, which it cannot hold, are escaped as JSON does."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def _counts(entry: Entry) -> dict[str, Any]:
    result = entry.result or {}
    return {"prompt_tokens": result.get("prompt_tokens", 0), "completion_tokens": result.get("completion_tokens", 0),
            "complete": result.get("complete", False)}


def _document_row(entry: Entry) -> dict[str, Any]:
    result = entry.result or {}
    row = {"path": entry.name, "summary": result.get("text"), "strategy": result.get("strategy"),
           "chunks": result.get("chunks", 0), "parts": result.get("parts", []), **_counts(entry)}
    return row if entry.error is None else {**row, "error": entry.error["message"]}


def _request_row(entry: Entry) -> dict[str, Any]:
    row = {"custom_id": entry.name, "text": (entry.result or {}).get("text"), **_counts(entry)}
    return row if entry.error is None else {**row, "custom_id": entry.error.get("custom_id", entry.name),
                                            "error": entry.error["message"], "line": entry.error.get("line")}


def _batch_row(entry: Entry, facts: Facts) -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/batch/request-output"""
    name = blake2b(entry.hash + entry.name.encode(), digest_size=12).hexdigest()
    row: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": entry.name, "response": None, "error": None}
    if entry.error is not None:
        error = {key: value for key, value in entry.error.items() if key != "custom_id"}
        return {**row, "custom_id": entry.error.get("custom_id", entry.name), "error": error}
    result = entry.result or {}
    body = result.get("body") or _completion(result, name, facts)
    return {**row, "response": {"status_code": 200, "request_id": f"req_{name}", "body": body}}


def _completion(result: dict[str, Any], name: str, facts: Facts) -> dict[str, Any]:
    """A document's summary as a server would have answered."""
    prompt, completion = result.get("prompt_tokens", 0), result.get("completion_tokens", 0)
    message = {"role": "assistant", "content": result.get("text"), "refusal": None}
    return {"id": f"chatcmpl-{name}", "object": "chat.completion", "created": facts.created, "model": facts.model,
            "choices": [{"index": 0, "message": message, "logprobs": None,
                         "finish_reason": "stop" if result.get("complete") else "length"}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}}


def _markdown(entry: Entry) -> str:
    title = f"# {PurePath(entry.name).name}\n\n"
    if entry.error is not None:
        return f"{title}**Not summarized:** {entry.error['message']}\n"
    result = entry.result or {}
    note = "" if result.get("complete", True) else "\n\n*A reply ended at its longest length.*"
    return f"{title}{result.get('text', '')}{note}\n\n---\n\nSource: `{entry.name}`\n"
