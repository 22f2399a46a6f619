"""The chat as an ASGI application: what it is made of, its page, its events, its start and its end."""
from __future__ import annotations

import asyncio
import contextlib
import mimetypes
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edge_runtime import __version__
from edge_runtime.apps.chat import (
    conversations,
    drafts,
    routes_library,
    routes_messages,
    routes_models,
    settings,
    tree,
)
from edge_runtime.apps.chat.calls import failed
from edge_runtime.apps.chat.errors import NotFoundError
from edge_runtime.apps.chat.events import Event, Hub
from edge_runtime.apps.chat.models import Models
from edge_runtime.apps.chat.pulls import Pulls
from edge_runtime.apps.chat.replies import Replies
from edge_runtime.apps.chat.security import STALE, Gate, Guard
from edge_runtime.apps.chat.store import Store
from edge_runtime.apps.model_host import BUNDLED, ModelHost

PAGE_SECONDS = 0.7  # how long loading the model waits for the first page: both at once would hold each other up
WEB = Path(__file__).parent / "web"
mimetypes.add_type("text/javascript", ".js")  # some Windows registries say text/plain, which no browser runs


class Chat:
    """All parts of one running chat. Owns store and host."""

    version = __version__

    def __init__(self, store: Store, host: ModelHost, gate: Gate):
        self.store, self.gate = store, gate
        self.hub = Hub()
        self.models = Models(host, store, self.hub)
        self.replies = Replies(store, self.models, self.hub)
        self.pulls = Pulls(self.hub)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.page_came = asyncio.Event()

    def default_preset(self) -> int:
        """Of new conversations: the one chosen; else, as sampling only adds errors to the bundled model's copying,
        precise for it and balanced for others."""
        chosen = settings.get(self.store)["preset"]
        known = settings.presets(self.store)
        if any(one["id"] == chosen for one in known):
            return int(chosen)
        name = "Precise" if (self.models.host.current or self.models.host.default) == BUNDLED else "Balanced"
        return int(next(one["id"] for one in known if one["name"] == name and one["builtin"]))

    def opened(self, key: int) -> dict[str, Any]:
        """A conversation with the messages that are shown, as far as they are written now, and its draft."""
        found = conversations.get(self.store, key)
        messages = [self.replies.overlaid(message) for message in tree.shown(self.store, found["leaf"])]
        return {**found, "messages": messages, "draft": drafts.get(self.store, f"c:{key}")}

    def standing(self) -> list[Event]:
        """How things stand, as events: what a page must know before it is told what changes."""
        kv = self.models.kv()
        return [("model", self.models.state), ("pull", self.pulls.state), *([("kv", kv)] if kv is not None else []),
                ("replies", {"running": self.replies.running()}), ("ready", {"version": self.version})]

    def tell_conversation(self, key: int) -> None:
        """Tell the pages what a conversation is now, its messages left out."""
        self.hub.publish("conversation", conversations.get(self.store, key))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run beside the requests."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def begin(self) -> None:
        """Bind to the loop, and open the model while the page comes up."""
        self.hub.bind(asyncio.get_running_loop())
        if self.models.host.llm is not None:
            self.models.ready()
        else:
            self.spawn(self._load())

    async def _load(self) -> None:
        """Open the model as soon as there is a page, or none comes."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.page_came.wait(), PAGE_SECONDS)
        with contextlib.suppress(NotFoundError):
            await self.models.load(await run_in_threadpool(self.models.remembered))

    async def end(self) -> None:
        """Stop replies, their text kept, and close everything."""
        self.hub.close()
        self.pulls.cancel()
        await self.replies.stop_all()
        await run_in_threadpool(self.models.host.close)
        self.store.close()


def create_app(store: Store, host: ModelHost, gate: Gate) -> Starlette:
    """The application; its lifespan opens the model and, at the end, closes store and host."""
    chat = Chat(store, host, gate)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await chat.begin()
        yield
        await chat.end()

    app = Starlette(routes=[
        Route("/", _page), Route("/open/{code}", _open), Route("/launch", _launch, methods=["POST"]),
        Route("/api/events", _events), *routes_messages.ROUTES, *routes_library.ROUTES, *routes_models.ROUTES,
        Mount("/web", _Files(directory=WEB)),
    ], lifespan=lifespan, exception_handlers={404: _unknown, 405: _unknown})
    app.state.chat = chat
    app.add_middleware(Guard, gate=gate)
    return app


class _Files(StaticFiles):
    """The page's own files: asked for again each time, so that an update is seen; unchanged ones are not sent."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["cache-control"] = "no-cache"
        return response


async def _page(request: Request) -> Response:
    return FileResponse(WEB / "index.html", headers={"cache-control": "no-store"})


async def _open(request: Request) -> Response:
    """Exchange a one-time code for the cookie."""
    gate: Gate = request.app.state.chat.gate
    cookie = gate.redeem(request.path_params["code"])
    if cookie is None and not gate.knows(request.headers.get("cookie", "")):
        return Response(STALE, status_code=403, media_type="text/plain")
    headers = {"cache-control": "no-store", **({"set-cookie": cookie} if cookie else {})}
    return RedirectResponse("/", status_code=303, headers=headers)


async def _launch(request: Request) -> Response:
    """A new link, for a second `edge-runtime chat` of the same user: it knows the secret from the owner's file."""
    gate: Gate = request.app.state.chat.gate
    return JSONResponse({"url": f"http://{gate.hosts[0]}/open/{gate.code()}"})


async def _events(request: Request) -> Response:
    chat: Chat = request.app.state.chat
    chat.page_came.set()
    return StreamingResponse(chat.hub.stream(chat.standing), media_type="text/event-stream",
                             headers={"cache-control": "no-store", "x-accel-buffering": "no"})


async def _unknown(request: Request, error: Exception) -> Response:
    return failed(NotFoundError("address", request.url.path))


