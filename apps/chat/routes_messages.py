"""Routes of messages: send, edit, regenerate, continue, stop, switch branches, fork, delete; and of drafts."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from edge_runtime.apps.chat import attachments, conversations, drafts, settings, tree
from edge_runtime.apps.chat.calls import Body, endpoint, failed, key, raw_body
from edge_runtime.apps.chat.errors import AttachmentError
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.apps.chat.app import Chat


def replying(store: Callable[[Chat, Request, Body], dict[str, Any]]) -> Callable[..., Any]:
    """A route that stores messages on a worker thread, then starts the reply on the loop."""

    @functools.wraps(store)
    async def route(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
        found = await run_in_threadpool(store, chat, request, body)
        chat.replies.start(found["reply"], found["conversation"], found.pop("text", ""))
        chat.tell_conversation(found["conversation"])
        # What the page shows next comes with the answer: its first token need not wait for another request.
        return {**found, "opened": await run_in_threadpool(chat.opened, found["conversation"])}

    return route


def send(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """A message, with the draft's attachments, and the beginning of its reply. The draft ends in the same
    transaction."""
    conversation, parent = body.optional_number("conversation"), body.optional_number("parent")
    text, draft = body.text("text"), drafts.checked_key(body.values.get("draft"))
    with chat.store.transaction():
        attached = attachments.of_draft(chat.store, draft)
        if not text.strip() and not attached:
            raise InvalidRequestError("text", text, "a message, or an attachment")
        if conversation is None:
            values, folder = settings.preset(chat.store, chat.default_preset()), body.optional_number("folder")
            if folder is not None:
                conversations.folder(chat.store, folder)
            conversation = conversations.create(
                chat.store, conversations.title_of(text, [one["name"] for one in attached]), preset=values["id"],
                system_prompt=values["system_prompt"], sampling=values["sampling"],
                folder=folder)
            parent = None
        conversations.get(chat.store, conversation)
        message = tree.add(chat.store, conversation, parent, "user", text)
        attachments.send(chat.store, draft, message)
        drafts.put(chat.store, draft, "")
        reply = tree.add(chat.store, conversation, message, "assistant", "", status="streaming")
    return {"conversation": conversation, "message": message, "reply": reply}


def edit(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """Another version of a message of the user's, beside the old one, and a reply to it."""
    text = body.text("text")
    with chat.store.transaction():
        old = tree.get(chat.store, key(request))
        if old["role"] != "user":
            raise InvalidRequestError("message", old["id"], "one of yours: replies are regenerated")
        if not text.strip() and not attachments.of_messages(chat.store, [old["id"]]):
            raise InvalidRequestError("text", text, "a message, or an attachment")
        message = tree.add(chat.store, old["conversation"], old["parent"], "user", text)
        attachments.copy(chat.store, old["id"], message)
        drafts.put(chat.store, f"e:{old['id']}", "")
        reply = tree.add(chat.store, old["conversation"], message, "assistant", "", status="streaming")
    return {"conversation": old["conversation"], "message": message, "reply": reply}


def regenerate(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """Another reply beside an old one, or one to a message that has none."""
    with chat.store.transaction():
        old = tree.get(chat.store, key(request))
        parent = old["id"] if old["role"] == "user" else old["parent"]
        if parent is None:
            raise InvalidRequestError("message", old["id"], "a reply to a message")
        reply = tree.add(chat.store, old["conversation"], parent, "assistant", "", status="streaming")
    return {"conversation": old["conversation"], "message": parent, "reply": reply}


def go_on(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """Write on at the end of a reply that was broken off."""
    with chat.store.transaction():  # of two that ask at once, the second finds it streaming
        old = tree.get(chat.store, key(request))
        if old["role"] != "assistant" or old["status"] not in ("interrupted", "stopped", "length", "error"):
            raise InvalidRequestError("message", old["id"], "a reply that was broken off")
        tree.save(chat.store, old["id"], old["content"], status="streaming")
    return {"conversation": old["conversation"], "message": old["parent"], "reply": old["id"], "text": old["content"]}


async def stop(chat: Chat, request: Request, body: Body) -> None:
    await chat.replies.stop(key(request))


def select(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return {"leaf": tree.select(chat.store, key(request))}


def fork(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    twin = conversations.fork(chat.store, key(request))
    chat.tell_conversation(twin)
    return {"conversation": twin}


async def delete(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    message = tree.get(chat.store, key(request))
    await chat.replies.stop_all(message["conversation"])
    return {"leaf": tree.delete_branch(chat.store, message["id"])}


def put_draft(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """Kept, and how many tokens it has."""
    text = body.text("text")
    drafts.put(chat.store, request.path_params["key"], text)
    return {"tokens": chat.models.count(text)}


def get_draft(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return drafts.get(chat.store, request.path_params["key"])


async def attach(request: Request) -> Any:
    """The file is the body, its name the query."""
    chat: Chat = request.app.state.chat
    name = request.query_params.get("name", "file")
    try:
        draft = drafts.checked_key(request.query_params.get("draft"))
        raw = await raw_body(request, attachments.MAX_BYTES + 1)
        return JSONResponse(await run_in_threadpool(attachments.add, chat.store, draft, name, raw,
                                                    pasted=request.query_params.get("pasted") == "1"))
    except InvalidRequestError as error:
        if error.parameter == "body":
            return failed(AttachmentError(name, f"is too large: the limit is {attachments.MAX_BYTES >> 20} MiB. Attach "
                                                f"the part that matters."))
        return failed(error)
    except (EdgeRuntimeError, MemoryError) as error:
        return failed(error)


def attachment(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return attachments.get(chat.store, key(request))


def detach(chat: Chat, request: Request, body: Body) -> None:
    attachments.remove(chat.store, key(request))


ROUTES = [
    Route("/api/messages", endpoint(replying(send)), methods=["POST"]),
    Route("/api/messages/{key:int}/edit", endpoint(replying(edit)), methods=["POST"]),
    Route("/api/messages/{key:int}/regenerate", endpoint(replying(regenerate)), methods=["POST"]),
    Route("/api/messages/{key:int}/continue", endpoint(replying(go_on)), methods=["POST"]),
    Route("/api/messages/{key:int}/stop", endpoint(stop), methods=["POST"]),
    Route("/api/messages/{key:int}/select", endpoint(select), methods=["POST"]),
    Route("/api/messages/{key:int}/fork", endpoint(fork), methods=["POST"]),
    Route("/api/messages/{key:int}", endpoint(delete), methods=["DELETE"]),
    Route("/api/drafts/{key}", endpoint(put_draft), methods=["PUT"]),
    Route("/api/drafts/{key}", endpoint(get_draft), methods=["GET"]),
    Route("/api/attachments", attach, methods=["POST"]),
    Route("/api/attachments/{key:int}", endpoint(attachment), methods=["GET"]),
    Route("/api/attachments/{key:int}", endpoint(detach), methods=["DELETE"]),
]
