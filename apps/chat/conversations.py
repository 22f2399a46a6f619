"""Conversations and folders: made, listed, renamed, pinned, filed, forked, deleted."""
from __future__ import annotations

import json
import time
from typing import Any

from edge_runtime.apps.chat import tree
from edge_runtime.apps.chat.errors import NotFoundError
from edge_runtime.apps.chat.store import Store
from edge_runtime.errors import InvalidRequestError

TITLE_LENGTH = 200
_FIELDS = "id, title, folder, pinned, system_prompt, sampling, preset, leaf, created, updated"
_GENERIC = ("Summarize the following text.", "Summarize the following text:")  # says nothing of what it is about
_CHANGEABLE = ("title", "folder", "pinned", "system_prompt", "sampling", "preset")


def create(store: Store, title: str, *, system_prompt: str = "", sampling: dict[str, Any] | None = None,
           preset: int | None = None, folder: int | None = None) -> int:
    now = time.time()
    return store.write("INSERT INTO conversations (title, folder, system_prompt, sampling, preset, created, updated) "
                       "VALUES (?, ?, ?, ?, ?, ?, ?)", title[:TITLE_LENGTH], folder, system_prompt,
                       json.dumps(sampling or {}), preset, now, now)


def listed(store: Store) -> list[dict[str, Any]]:
    """All, the last used first, without their messages."""
    return [_read(row) for row in store.rows(f"SELECT {_FIELDS} FROM conversations ORDER BY updated DESC, id DESC")]


def get(store: Store, conversation: int) -> dict[str, Any]:
    found = store.row(f"SELECT {_FIELDS} FROM conversations WHERE id = ?", conversation)
    if found is None:
        raise NotFoundError("conversation", conversation)
    return _read(found)


def change(store: Store, conversation: int, values: dict[str, Any]) -> dict[str, Any]:
    """Set some of title, folder, pinned, system_prompt, sampling, preset; returns the conversation."""
    with store.transaction():
        get(store, conversation)
        for name, value in values.items():
            if name not in _CHANGEABLE:
                raise InvalidRequestError("field", name, f"one of {', '.join(_CHANGEABLE)}")
            if name == "title":
                value = " ".join(str(value).split())[:TITLE_LENGTH]
                if not value:
                    raise InvalidRequestError("title", value, "at least one character")
            if name == "folder" and value is not None:
                folder(store, value)
            if name == "sampling":
                value = json.dumps(value)
            store.write(f"UPDATE conversations SET {name} = ? WHERE id = ?", value, conversation)
    return get(store, conversation)


def delete(store: Store, conversation: int) -> None:
    with store.transaction():
        store.write("DELETE FROM drafts WHERE key = ?", f"c:{conversation}")
        store.write("DELETE FROM attachments WHERE draft = ?", f"c:{conversation}")
        if not store.changed("DELETE FROM conversations WHERE id = ?", conversation):
            raise NotFoundError("conversation", conversation)


def fork(store: Store, message: int) -> int:
    """A new conversation that holds the path to `message`; returns its id."""
    with store.transaction():
        source = get(store, tree.get(store, message)["conversation"])
        twin = create(store, f"{source['title']} (fork)", system_prompt=source["system_prompt"],
                      sampling=source["sampling"], preset=source["preset"], folder=source["folder"])
        tree.copy_path(store, message, twin)
    return twin


def title_of(text: str, names: list[str]) -> str:
    """A title from the first message: its first line, cut at a word, or the first attachment's name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0] in _GENERIC:
        del lines[0]
    line = lines[0] if lines else names[0] if names else ""
    if len(line) > 60:
        line = line[:60].rsplit(" ", 1)[0] + "…"
    return line or "New conversation"


def folders(store: Store) -> list[dict[str, Any]]:
    return store.rows("SELECT id, name FROM folders ORDER BY name COLLATE NOCASE, id")


def folder(store: Store, key: int) -> dict[str, Any]:
    found = store.row("SELECT id, name FROM folders WHERE id = ?", key)
    if found is None:
        raise NotFoundError("folder", key)
    return found


def _read(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "pinned": bool(row["pinned"]), "sampling": json.loads(row["sampling"])}
