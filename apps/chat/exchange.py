"""Conversations in and out: JSON with the whole tree, Markdown with the path that is shown."""
from __future__ import annotations

import json
import re
import time
from collections.abc import Hashable
from typing import Any

from edge_runtime.apps.chat import attachments, conversations, tree
from edge_runtime.apps.chat.errors import ImportFileError
from edge_runtime.apps.chat.json_input import read_json
from edge_runtime.apps.chat.schema import STATUSES
from edge_runtime.apps.chat.settings import SAMPLING, checked_sampling
from edge_runtime.apps.chat.store import Store
from edge_runtime.errors import InvalidRequestError

FORMAT, VERSION = "edge-runtime-chat", 1
_HEADING = re.compile(r"^## (User|Assistant)[ \t]*$", re.MULTILINE)
_BORDER = re.compile(r"^(?:## (?P<heading>User|Assistant)[ \t]*$|(?P<fence>`{3,}|~{3,}))", re.MULTILINE)


def to_json(store: Store, keys: list[int]) -> str:
    """Everything of these conversations: all branches, attachments, settings, folders by name."""
    names = {one["id"]: one["name"] for one in conversations.folders(store)}
    return json.dumps({"format": FORMAT, "version": VERSION, "exported": time.time(),
                       "conversations": [_exported(store, key, names) for key in keys]}, ensure_ascii=False, indent=1)


def _exported(store: Store, key: int, folders: dict[int, str]) -> dict[str, Any]:
    one = conversations.get(store, key)
    rows = store.rows("SELECT * FROM messages WHERE conversation = ? ORDER BY id", key)
    attached = attachments.of_messages(store, [row["id"] for row in rows])
    messages = [{
        "id": row["id"], "parent": row["parent"], "role": row["role"], "content": row["content"],
        "status": row["status"], "error": row["error"], "model": row["model"], "created": row["created"],
        "stats": json.loads(row["stats"]) if row["stats"] else None,
        "attachments": [{key: full[key] for key in ("name", "kind", "text", "bytes")}
                        for full in (attachments.get(store, short["id"]) for short in attached.get(row["id"], []))],
    } for row in rows]
    return {"title": one["title"], "folder": folders.get(one["folder"]), "pinned": one["pinned"],
            "system_prompt": one["system_prompt"], "sampling": one["sampling"], "leaf": one["leaf"],
            "created": one["created"], "updated": one["updated"], "messages": messages}


def to_markdown(store: Store, key: int) -> str:
    """The path that is shown. Attachments are fenced, with a fence longer than any in them."""
    one = conversations.get(store, key)
    parts = [f"# {one['title']}"]
    if one["system_prompt"].strip():
        parts.append("\n".join(f"> {line}".rstrip() for line in one["system_prompt"].strip().splitlines()))
    path = tree.path(store, one["leaf"])
    texts = attachments.texts(store, [message["id"] for message in path])
    for message in path:
        parts.append("## User" if message["role"] == "user" else "## Assistant")
        for attached in texts.get(message["id"], []):
            runs = [len(run) for run in re.findall(r"`{3,}", attached["text"])]
            fence = "`" * (max(runs, default=2) + 1)
            parts.append(f"**Attachment: {attached['name']}**\n\n{fence}text\n{attached['text'].strip()}\n{fence}")
        if message["content"].strip():
            parts.append(_HEADING.sub(lambda found: "\\" + found[0], message["content"].strip()))
    return "\n\n".join(parts) + "\n"


def import_text(store: Store, text: str, name: str = "") -> list[int]:
    """Conversations from an export of either kind; returns their ids. All of them or none. Raises ImportFileError."""
    stripped = text.lstrip("\ufeff \t\r\n")
    if stripped.startswith(("{", "[")):
        try:
            data = read_json(stripped)
        except ValueError as error:
            raise ImportFileError(f"{name or 'The file'} is not complete JSON ({error}). Export it again.") from error
        except RecursionError as error:
            raise ImportFileError(f"{name or 'The file'} is nested too deeply to be an export.") from error
        with store.transaction():
            return [_imported(store, one, f"conversations[{i}]") for i, one in enumerate(_conversations(data, name))]
    return [_from_markdown(store, stripped, name)]


def _conversations(data: Any, name: str) -> list[Any]:
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("conversations"), list):
        raise ImportFileError(f"{name or 'The file'} is JSON, but no export of this chat (\"format\": \"{FORMAT}\").")
    if data.get("version") != VERSION:
        raise ImportFileError(f"{name or 'The file'} has version {data.get('version')!r}, this chat reads {VERSION}. "
                              f"Update edge-runtime.")
    return list(data["conversations"])


def _imported(store: Store, one: Any, where: str) -> int:
    if not isinstance(one, dict) or not isinstance(one.get("messages"), list):
        raise ImportFileError(f"{where} has no list of messages.")
    key = conversations.create(
        store, _text(one, "title", where) or "Imported", system_prompt=_text(one, "system_prompt", where),
        sampling=_sampling(one, where),
        folder=_folder(store, one.get("folder")))
    ids: dict[Any, int] = {}
    for i, message in enumerate(one["messages"]):
        spot = f"{where}.messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise ImportFileError(f"{spot}.role must be user or assistant.")
        parent, own = message.get("parent"), message.get("id", f"no id {i}")
        if parent is not None and (not isinstance(parent, Hashable) or parent not in ids):
            raise ImportFileError(f"{spot}.parent is {parent!r}, which is no message before it.")
        if not isinstance(own, Hashable) or own in ids:
            raise ImportFileError(f"{spot}.id is {own!r}: must be a number that no message before it has.")
        status = message.get("status")
        status = "interrupted" if status == "streaming" else status if status in STATUSES else "complete"
        new = tree.add(store, key, None if parent is None else ids[parent], message["role"],
                       _text(message, "content", spot), status=status, model=_text(message, "model", spot) or None)
        stats = message.get("stats")
        tree.save(store, new, _text(message, "content", spot), status=status,
                  error=_text(message, "error", spot) or None, stats=stats if isinstance(stats, dict) else None)
        ids[own] = new
        files = message.get("attachments") or []
        if not isinstance(files, list) or not all(isinstance(attached, dict) for attached in files):
            raise ImportFileError(f"{spot}.attachments must be a list of objects.")
        for attached in files:
            body = _text(attached, "text", spot)
            store.write("INSERT INTO attachments (message, name, kind, text, bytes, created) VALUES (?, ?, ?, ?, ?, ?)",
                        new, _text(attached, "name", spot) or "file", _text(attached, "kind", spot) or "text", body,
                        len(body.encode("utf-8", "replace")), time.time())
    leaf = one.get("leaf")
    if isinstance(leaf, Hashable) and leaf in ids:
        store.write("UPDATE conversations SET leaf = ? WHERE id = ?", ids[leaf], key)
    store.write("UPDATE conversations SET pinned = ? WHERE id = ?", int(bool(one.get("pinned"))), key)
    return key


def _from_markdown(store: Store, text: str, name: str) -> int:
    """A Markdown file with `## User` and `## Assistant` headings, as `to_markdown` writes it."""
    text = text.replace("\r\n", "\n")
    spots = _headings(text)
    if not spots:
        raise ImportFileError(f"{name or 'The file'} holds no conversation: no line says ## User or ## Assistant.")
    head = text[:spots[0].start()]
    title = next((line[2:].strip() for line in head.splitlines() if line.startswith("# ")), name or "Imported")
    system = "\n".join(line[1:].removeprefix(" ") for line in head.splitlines() if line.startswith(">"))
    with store.transaction():
        key = conversations.create(store, title, system_prompt=system)
        parent: int | None = None
        for i, spot in enumerate(spots):
            end = spots[i + 1].start() if i + 1 < len(spots) else len(text)
            content = re.sub(r"^\\(## (?:User|Assistant))", r"\1", text[spot.end():end].strip(), flags=re.MULTILINE)
            parent = tree.add(store, key, parent, spot["heading"].lower(), content)
    return key


def _headings(text: str) -> list[re.Match[str]]:
    """Those that stand outside of fenced code, an attachment's, say."""
    spots, fence = [], ""
    for found in _BORDER.finditer(text):
        if found["heading"]:
            if not fence:
                spots.append(found)
        elif not fence:
            fence = found["fence"]
        elif found["fence"][0] == fence[0] and len(found["fence"]) >= len(fence):
            fence = ""
    return spots


def _folder(store: Store, name: Any) -> int | None:
    if not isinstance(name, str) or not name.strip():
        return None
    found = store.row("SELECT id FROM folders WHERE name = ?", name.strip())
    return found["id"] if found else store.write("INSERT INTO folders (name) VALUES (?)", name.strip())


def _sampling(one: dict[str, Any], where: str) -> dict[str, Any]:
    """What of it this chat knows."""
    values = one.get("sampling")
    try:
        return checked_sampling({name: value for name, value in (values if isinstance(values, dict) else {}).items()
                                 if name in SAMPLING})
    except InvalidRequestError as error:
        raise ImportFileError(f"{where}.sampling: {error}") from error


def _text(values: dict[str, Any], field: str, where: str) -> str:
    value = values.get(field)
    if value is not None and not isinstance(value, str):
        raise ImportFileError(f"{where}.{field} must be text.")
    return value or ""
