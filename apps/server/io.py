"""Bodies in, answers out: JSON with a limit, server-sent events, and noticing that the client has gone."""
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.apps.server.errors import ApiError, api_error
from edge_runtime.apps.server.guard import ClientGone, Receive, Scope, Send
from edge_runtime.apps.server.schemas import COMPONENTS, Schema
from edge_runtime.apps.server.validation import validated

if TYPE_CHECKING:
    from edge_runtime.apps.model_host import ModelHost
    from edge_runtime.llm import LLM

log = logging.getLogger(__name__)
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LARGE_BYTES = 64 << 10  # bodies beyond it are checked on another thread: the event loop has streams to serve


async def read_body(request: Request, schema: Schema, limit: int) -> dict[str, Any]:
    """The JSON body, checked. Raises ApiError: 413 beyond `limit` bytes, 415 for another content type, 400."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Unsupported content type {kind!r:.80}: send application/json.",
                       code="unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise _too_large(limit)
    except Exception as error:
        if type(error).__name__ == "ClientDisconnect":
            raise ClientGone from error
        raise
    if len(body) <= LARGE_BYTES:
        return _checked(bytes(body), schema)
    return await asyncio.to_thread(_checked, bytes(body), schema)


def _checked(body: bytes, schema: Schema) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}.",
                       code="invalid_json") from None
    checked: dict[str, Any] = validated(value, schema, COMPONENTS)
    return checked


def _too_large(limit: int) -> ApiError:
    # The connection is not used again: where the rest of the body is long, nobody waits for it.
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large",
                    headers={"connection": "close"})


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    data = b"data: " + orjson.dumps(value) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client goes away; then ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def leased(request: Request, stack: contextlib.AsyncExitStack, host: ModelHost, name: str) -> LLM:
    """The LLM of that name, held until `stack` ends; a client that goes away does not wait for a switch of models."""
    entering = stack.enter_async_context(host.lease(name))
    return await (entering if name == host.current and not host.switching else unless_gone(request, entering))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from an iterator, which is closed however the stream ends. Errors become the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], Awaitable[Any]]):
        self.events, self.on_close = events, on_close
        self.status_code, self.background, self.body = 200, None, b""
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                            (b"x-accel-buffering", b"no")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = asyncio.current_task()
        assert own is not None
        left = ended = False

        async def watch() -> None:
            nonlocal left
            await _gone(receive)
            if not ended:
                left = True
                own.cancel()

        watcher: asyncio.Task[None] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            watcher = asyncio.ensure_future(watch())
            try:
                async for data in self.events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                known = api_error(error, scope["path"])
                if known.status == 500:
                    log.exception("%s failed in the middle of a stream", scope["path"], exc_info=error)
                await send({"type": "http.response.body", "body": event(known.body), "more_body": True})
            ended = True  # from here on the server itself says that the exchange is over
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            if not left:
                raise
            raise ClientGone from None
        finally:
            if watcher is not None:
                watcher.cancel()
            with contextlib.suppress(Exception):
                await self.events.aclose()  # type: ignore[attr-defined]
            await self.on_close()
