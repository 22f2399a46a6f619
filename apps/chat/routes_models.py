"""Routes of models: what there is, whether it fits, open one, add a file, pull one from a hub."""
from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.routing import Route

from edge_runtime.apps.chat.calls import Body, endpoint

if TYPE_CHECKING:
    from edge_runtime.apps.chat.app import Chat


def listed(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return {"models": chat.models.listed(), "state": chat.models.state, "pull": chat.pulls.state}


def plan(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return chat.models.plan(request.query_params.get("name", ""))


async def load(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    """Open another model. Replies that run end first, their text is kept."""
    name = body.text("name")
    chat.models.host.known(name)
    await chat.replies.stop_all()
    chat.spawn(chat.models.load(name, remember=True))
    await asyncio.sleep(0)
    return {"state": chat.models.state}


def add(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    return chat.models.add(body.text("path")) | {"models": chat.models.listed()}


async def pull(chat: Chat, request: Request, body: Body) -> dict[str, Any]:
    chat.spawn(chat.pulls.pull(body.text("model")))
    await asyncio.sleep(0)
    return {"pull": chat.pulls.state}


async def stop_pull(chat: Chat, request: Request, body: Body) -> None:
    chat.pulls.cancel()


ROUTES = [
    Route("/api/models", endpoint(listed)),
    Route("/api/models/plan", endpoint(plan)),
    Route("/api/models/load", endpoint(load), methods=["POST"]),
    Route("/api/models/add", endpoint(add), methods=["POST"]),
    Route("/api/models/pull", endpoint(pull), methods=["POST"]),
    Route("/api/models/pull", endpoint(stop_pull), methods=["DELETE"]),
]
