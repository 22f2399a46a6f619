"""Files beside a message: read to text when they come in, kept with a draft until it is sent."""
from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from edge_runtime.apps import documents
from edge_runtime.apps.chat.errors import AttachmentError, NotFoundError
from edge_runtime.apps.chat.store import Store

MAX_BYTES = 32 << 20  # of one file: a thousand pages of text are 3 MB
MAX_CHARACTERS = 4_000_000  # of its text: a million tokens
_FIELDS = "id, name, kind, bytes, length(text) AS characters, created"


def add(store: Store, draft: str, name: str, raw: bytes, *, pasted: bool = False) -> dict[str, Any]:
    """Attach a file's bytes to a draft. Raises AttachmentError, and MissingExtraError where a
    format's library is not installed."""
    name = PurePath(name.replace("\\", "/")).name[:200].lstrip(".") or "file"
    if len(raw) > MAX_BYTES:
        raise AttachmentError(name, f"has {len(raw) / 2**20:.0f} MiB, the limit is {MAX_BYTES >> 20} MiB. Attach the "
                                    f"part that matters.")
    kind = "paste" if pasted else "pdf" if raw.startswith(b"%PDF-") else "text"
    text = text_of(name, raw)
    if len(text) > MAX_CHARACTERS:
        raise AttachmentError(name, f"holds {len(text):,} characters, the limit is {MAX_CHARACTERS:,}. Attach the part "
                                    f"that matters.")
    key = store.write("INSERT INTO attachments (draft, name, kind, text, bytes, created) VALUES (?, ?, ?, ?, ?, ?)",
                      draft, name, kind, text, len(raw), time.time())
    return get(store, key, with_text=False)


def text_of(name: str, raw: bytes) -> str:
    """The text of a file's bytes. Raises AttachmentError, MissingExtraError."""
    suffix = ".pdf" if raw.startswith(b"%PDF-") else PurePath(name).suffix
    try:
        return documents.text_of(Path(name).with_suffix(suffix), raw)
    except documents.DocumentError as error:
        raise AttachmentError(name, error.reason) from error


def get(store: Store, attachment: int, with_text: bool = True) -> dict[str, Any]:
    found = store.row(f"SELECT {_FIELDS}, message, draft{', text' if with_text else ''} FROM attachments WHERE id = ?",
                      attachment)
    if found is None:
        raise NotFoundError("attachment", attachment)
    return found


def remove(store: Store, attachment: int) -> None:
    """Take one off a draft; what was sent stays as it was sent."""
    store.write("DELETE FROM attachments WHERE id = ? AND message IS NULL", attachment)


def of_draft(store: Store, draft: str) -> list[dict[str, Any]]:
    return store.rows(f"SELECT {_FIELDS} FROM attachments WHERE draft = ? ORDER BY id", draft)


def of_messages(store: Store, messages: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """message id -> its attachments, without their texts."""
    return _by_message(store, messages, _FIELDS)


def texts(store: Store, messages: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """message id -> {name, text} of its attachments."""
    return _by_message(store, messages, "name, text")


def send(store: Store, draft: str, message: int) -> None:
    """A draft's attachments become the message's."""
    store.write("UPDATE attachments SET message = ?, draft = NULL WHERE draft = ?", message, draft)


def copy(store: Store, message: int, target: int) -> None:
    """Give another message the same attachments."""
    store.write("INSERT INTO attachments (message, name, kind, text, bytes, created) SELECT ?, name, kind, text, "
                "bytes, created FROM attachments WHERE message = ? ORDER BY id", target, message)


def _by_message(store: Store, messages: Sequence[int], columns: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for start in range(0, len(messages), 500):  # SQLite bounds the number of values
        part = messages[start:start + 500]
        for row in store.rows(f"SELECT message, {columns} FROM attachments WHERE message IN "
                              f"({', '.join('?' * len(part))}) ORDER BY id", *part):
            found.setdefault(row.pop("message"), []).append(row)
    return found
