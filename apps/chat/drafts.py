"""What was typed and not sent: kept per place, a conversation (`c:12`), an edit (`e:34`) or the empty page (`new`)."""
from __future__ import annotations

import re
import time
from typing import Any

from edge_runtime.apps.chat import attachments
from edge_runtime.apps.chat.store import Store
from edge_runtime.errors import InvalidRequestError

_KEY = re.compile(r"new|[ce]:\d{1,18}")


def checked_key(key: Any) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidRequestError("draft", key, "new, c:CONVERSATION or e:MESSAGE")
    return key


def put(store: Store, key: str, text: str) -> None:
    """Keep `text`; an empty one forgets the draft (its attachments stay until they are removed or sent)."""
    if text:
        store.write("INSERT INTO drafts (key, text, updated) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                    "text = excluded.text, updated = excluded.updated", checked_key(key), text, time.time())
    else:
        store.write("DELETE FROM drafts WHERE key = ?", checked_key(key))


def get(store: Store, key: str) -> dict[str, Any]:
    """{text, updated, attachments}"""
    found = store.row("SELECT text, updated FROM drafts WHERE key = ?", checked_key(key))
    return {**(found or {"text": "", "updated": 0}), "attachments": attachments.of_draft(store, key)}


def keys(store: Store) -> list[str]:
    """Places with a draft, for marks in the list."""
    return [row["key"] for row in store.rows("SELECT key FROM drafts UNION SELECT draft FROM attachments WHERE draft "
                                             "IS NOT NULL")]
