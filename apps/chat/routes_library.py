"""Routes of conversations, folders, presets, settings, search, export and import."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_runtime.apps.chat import conversations, drafts, exchange, search, settings
from edge_runtime.apps.chat.calls import Body, endpoint, failed, key, raw_body, stored_key
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.apps.chat.app import Chat

MAX_IMPORT = 256 << 20


def start(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """All that a page needs first."""
    return {"conversations": conversations.listed(chat.store), "folders": conversations.folders(chat.store),
            "presets": settings.presets(chat.store), "settings": settings.get(chat.store),
            "default_preset": chat.default_preset(), "drafts": drafts.keys(chat.store), "model": chat.models.state,
            "kv": chat.models.kv(), "version": chat.version, "data": str(chat.store.folder)}


def conversation(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return chat.opened(key(request))


def change(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    values = dict(body.values)
    if "sampling" in values:
        values["sampling"] = settings.checked_sampling(values["sampling"])
    for name in ("title", "system_prompt"):
        if name in values:
            values[name] = body.text(name)
    for name in ("folder", "preset"):
        if name in values:
            values[name] = body.optional_number(name)
    if "pinned" in values:
        values["pinned"] = int(bool(values["pinned"]))
    found = conversations.change(chat.store, key(request), values)
    chat.tell_conversation(found["id"])
    return found


async def remove(chat: Chat, request: Request, body: Body) -> None:
    await chat.replies.stop_all(key(request))
    await run_in_threadpool(conversations.delete, chat.store, key(request))
    chat.hub.publish("gone", {"conversation": key(request)})


def new_folder(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    made = chat.store.write("INSERT INTO folders (name) VALUES (?)", _name(body))
    return _folders(chat) | {"folder": made}


def rename_folder(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    conversations.folder(chat.store, key(request))
    chat.store.write("UPDATE folders SET name = ? WHERE id = ?", _name(body), key(request))
    return _folders(chat)


def remove_folder(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """Its conversations stay, in no folder."""
    conversations.folder(chat.store, key(request))
    chat.store.write("DELETE FROM folders WHERE id = ?", key(request))
    return _folders(chat)


def _folders(chat: Chat) -> dict[str, Any]:
    found = conversations.folders(chat.store)
    chat.hub.publish("folders", {"folders": found})
    return {"folders": found}


def _name(body: Body) -> str:
    name = " ".join(body.text("name").split())[:80]
    if not name:
        raise InvalidRequestError("name", name, "at least one character")
    return name


def save_preset(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    made = settings.save_preset(chat.store, body.text("name"), body.text("system_prompt", ""),
                                body.mapping("sampling"),
                                key(request) if "key" in request.path_params else None)
    return {"presets": settings.presets(chat.store), "preset": made}


def remove_preset(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    settings.delete_preset(chat.store, key(request))
    return {"presets": settings.presets(chat.store)}


def change_settings(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    for name in body.values:
        if name not in ("theme", "sidebar", "preset"):
            raise InvalidRequestError("setting", name, "theme, sidebar or preset")
    if not isinstance(body.values.get("sidebar", True), bool):
        raise InvalidRequestError("sidebar", body.values["sidebar"], "true or false")
    body.optional_number("preset")
    return settings.put(chat.store, body.values)


def find(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return {"hits": search.find(chat.store, request.query_params.get("q", "")[:400])}


def export(chat: Chat, request: Request, body: Body) -> Response:
    """One conversation (`conversation`), or all; as json, or md for one."""
    chosen, kind = request.query_params.get("conversation"), request.query_params.get("format", "json")
    if kind not in ("json", "md") or (kind == "md" and not chosen):
        raise InvalidRequestError("format", kind, "json, or md for one conversation")
    keys = [stored_key(chosen)] if chosen else [one["id"] for one in conversations.listed(chat.store)]
    title = conversations.get(chat.store, keys[0])["title"] if chosen else "edge-runtime-chats"
    text = exchange.to_json(chat.store, keys) if kind == "json" else exchange.to_markdown(chat.store, keys[0])
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]+', " ", title).strip()[:80] or "chat"
    return Response(text.encode("utf-8", "replace"), headers={
        "content-type": "application/json" if kind == "json" else "text/markdown; charset=utf-8",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(f'{name}.{kind}')}"})


async def take_in(request: Request) -> Response:
    """Import: the file is the body."""
    chat: Chat = request.app.state.chat
    name = request.query_params.get("name", "The file")
    try:
        raw = await raw_body(request, MAX_IMPORT)
        text = raw.decode("utf-8", "strict")
        keys = await run_in_threadpool(exchange.import_text, chat.store, text, name)
    except UnicodeDecodeError:
        from edge_runtime.apps.chat.errors import ImportFileError

        return failed(ImportFileError(f"{name} is not text in UTF-8, so it is no export of this chat."))
    except (EdgeRuntimeError, MemoryError) as error:
        return failed(error)
    for one in keys:
        chat.tell_conversation(one)
    _folders(chat)
    return JSONResponse({"conversations": keys})


ROUTES = [
    Route("/api/start", endpoint(start)),
    Route("/api/conversations/{key:int}", endpoint(conversation), methods=["GET"]),
    Route("/api/conversations/{key:int}", endpoint(change), methods=["PATCH"]),
    Route("/api/conversations/{key:int}", endpoint(remove), methods=["DELETE"]),
    Route("/api/folders", endpoint(new_folder), methods=["POST"]),
    Route("/api/folders/{key:int}", endpoint(rename_folder), methods=["PATCH"]),
    Route("/api/folders/{key:int}", endpoint(remove_folder), methods=["DELETE"]),
    Route("/api/presets", endpoint(save_preset), methods=["POST"]),
    Route("/api/presets/{key:int}", endpoint(save_preset), methods=["PATCH"]),
    Route("/api/presets/{key:int}", endpoint(remove_preset), methods=["DELETE"]),
    Route("/api/settings", endpoint(change_settings), methods=["PATCH"]),
    Route("/api/search", endpoint(find)),
    Route("/api/export", endpoint(export)),
    Route("/api/import", take_in, methods=["POST"]),
]
