"""A conversation's messages as a tree: its `leaf` says which path is shown; edits and regenerations are siblings."""
from __future__ import annotations

import json
import time
from typing import Any

from edge_runtime.apps.chat import attachments
from edge_runtime.apps.chat.errors import NotFoundError
from edge_runtime.apps.chat.store import Store

_PATH = """
WITH RECURSIVE up(id, parent, depth) AS (
    SELECT id, parent, 0 FROM messages WHERE id = ?
    UNION ALL SELECT m.id, m.parent, up.depth + 1 FROM messages m JOIN up ON m.id = up.parent)
SELECT m.* FROM up JOIN messages m ON m.id = up.id ORDER BY up.depth DESC
"""
# Ids grow with time, so the largest id below a message is the leaf that was written last.
_BELOW = """
WITH RECURSIVE down(id) AS (
    SELECT id FROM messages WHERE id = ?
    UNION ALL SELECT m.id FROM messages m JOIN down ON m.parent = down.id)
"""


def add(store: Store, conversation: int, parent: int | None, role: str, content: str, *, status: str = "complete",
        model: str | None = None, select: bool = True) -> int:
    """A new message below `parent` (None: a root), shown from now on where `select`."""
    now = time.time()
    with store.transaction():
        if parent is not None and get(store, parent)["conversation"] != conversation:
            raise NotFoundError("message", f"{parent} in this conversation")
        key = store.write("INSERT INTO messages (conversation, parent, role, content, status, model, created) "
                          "VALUES (?, ?, ?, ?, ?, ?, ?)", conversation, parent, role, content, status, model, now)
        if select:
            store.write("UPDATE conversations SET leaf = ?, updated = ? WHERE id = ?", key, now, conversation)
    return key


def get(store: Store, message: int) -> dict[str, Any]:
    found = store.row("SELECT * FROM messages WHERE id = ?", message)
    if found is None:
        raise NotFoundError("message", message)
    return found


def save(store: Store, message: int, content: str, *, status: str = "streaming", error: str | None = None,
         stats: dict[str, Any] | None = None, model: str | None = None) -> None:
    """What a reply has come to. A message that was deleted meanwhile stays deleted."""
    store.write("UPDATE messages SET content = ?, status = ?, error = ?, stats = coalesce(?, stats), "
                "model = coalesce(?, model) WHERE id = ?", content, status, error,
                None if stats is None else json.dumps(stats), model, message)


def path(store: Store, leaf: int | None) -> list[dict[str, Any]]:
    """Messages from the root to `leaf`, as they are stored."""
    return [] if leaf is None else store.rows(_PATH, leaf)


def shown(store: Store, leaf: int | None) -> list[dict[str, Any]]:
    """The path for the page: each message with its siblings' ids, oldest first, and its attachments."""
    messages = path(store, leaf)
    if not messages:
        return []
    siblings: dict[int | None, list[int]] = {}
    for row in store.rows("SELECT id, parent FROM messages WHERE conversation = ? ORDER BY id",
                          messages[0]["conversation"]):
        siblings.setdefault(row["parent"], []).append(row["id"])
    attached = attachments.of_messages(store, [message["id"] for message in messages])
    return [{**message, "stats": json.loads(message["stats"]) if message["stats"] else None,
             "siblings": siblings[message["parent"]], "attachments": attached.get(message["id"], [])}
            for message in messages]


def last_leaf(store: Store, message: int) -> int:
    """The end of the branch through `message` that was written last."""
    found = store.row(f"{_BELOW} SELECT max(id) AS id FROM down", message)
    if found is None or found["id"] is None:
        raise NotFoundError("message", message)
    return int(found["id"])


def select(store: Store, message: int) -> int:
    """Show the branch through `message`; returns its leaf."""
    leaf = last_leaf(store, message)
    store.write("UPDATE conversations SET leaf = ? WHERE id = ?", leaf, get(store, message)["conversation"])
    return leaf


def delete_branch(store: Store, message: int) -> int | None:
    """Delete `message` and all below it. Shown is then its youngest sibling's branch, else its parent; returns the
    leaf."""
    with store.transaction():
        gone = get(store, message)
        store.write(f"{_BELOW} DELETE FROM messages WHERE id IN (SELECT id FROM down)", message)
        conversation = store.row("SELECT leaf FROM conversations WHERE id = ?", gone["conversation"])
        leaf: int | None = conversation["leaf"] if conversation else None
        if leaf is None or store.row("SELECT id FROM messages WHERE id = ?", leaf) is None:
            sibling = store.row("SELECT max(id) AS id FROM messages WHERE conversation = ? AND parent IS ?",
                                gone["conversation"], gone["parent"])
            leaf = gone["parent"]
            if sibling is not None and sibling["id"] is not None:
                leaf = last_leaf(store, sibling["id"])
            store.write("UPDATE conversations SET leaf = ? WHERE id = ?", leaf, gone["conversation"])
    return leaf


def copy_path(store: Store, message: int, target: int) -> int:
    """Copy the path to `message`, with attachments, into another conversation, and show it; returns the last id."""
    with store.transaction():
        parent: int | None = None
        for one in path(store, message):
            status = "interrupted" if one["status"] == "streaming" else one["status"]
            parent = add(store, target, parent, one["role"], one["content"], status=status, model=one["model"])
            store.write("UPDATE messages SET stats = ?, error = ?, created = ? WHERE id = ?", one["stats"],
                        one["error"], one["created"], parent)
            attachments.copy(store, one["id"], parent)
        if parent is None:
            raise NotFoundError("message", message)
        return parent
