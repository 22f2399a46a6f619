"""Who may come in, and what every answer has in common: API key, Host and Origin, how many at once, errors as JSON."""
from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from edge_runtime.apps.server.errors import ApiError, api_error, shutting_down

if TYPE_CHECKING:
    from edge_runtime.apps.server.state import ServerState

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ALLOWED_HEADERS = b"authorization, content-type"  # where a page names none; OpenAI's client in a browser names more
LINGER_SECONDS = 5.0  # how long a refused body is read on, and dropped


class ClientGone(Exception):
    """The client closed the connection before its answer was whole."""


class Guard:
    """ASGI middleware around the routes."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], state: ServerState):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        answer = _Answer(send, self._cors(headers))
        began = time.perf_counter()
        task = asyncio.current_task()
        assert task is not None
        self.state.running.add(task)
        try:
            if not self._preflight(scope, headers):
                self._check(scope, headers)
                await self.app(scope, receive, answer.send)
            else:
                await answer.simple(204)
        except ClientGone:
            answer.status = 499
        except asyncio.CancelledError:
            if not self.state.closing:
                answer.status = 499
                raise
            await answer.error(shutting_down())
        except Exception as error:
            known = api_error(error, scope["path"])
            if known.status == 500:
                log.exception("%s %s failed", scope["method"], scope["path"], exc_info=error)
            await answer.error(known, receive)
        finally:
            self.state.running.discard(task)
            path = scope["path"] if scope["path"] in self.state.paths else "other"
            self.state.metrics.answered(path, answer.status, time.perf_counter() - began)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        settings = self.state.settings
        names = settings.host_names
        host = headers.get(b"host", b"").decode("latin-1")
        if names is not None and _name(host) not in names:
            raise ApiError(403, f"The server does not answer to the name {_name(host)!r:.80}.", code="host_not_allowed")
        if b"origin" in headers and not self._allowed(headers[b"origin"], host):
            raise ApiError(403, "Web pages of other origins may not call this server.", code="origin_not_allowed")
        if settings.api_key is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), settings.api_key.encode()):
                said = "Incorrect API key provided." if given else (
                    "You didn't provide an API key: send it in the header Authorization: Bearer KEY.")
                raise ApiError(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self.state.closing and scope["method"] == "POST":
            raise shutting_down()
        if scope["method"] == "POST" and len(self.state.running) > settings.max_requests:
            raise ApiError(429, f"{settings.max_requests} requests run or wait already. Try again later.",
                           type="rate_limit_error", code="rate_limit_exceeded", headers={"retry-after": "1"})

    def _allowed(self, origin: bytes, host: str) -> bool:
        text = origin.decode("latin-1")
        listed = self.state.settings.allowed_origins
        return "*" in listed or text in listed or (bool(host) and _authority(text) == host)

    def _cors(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Headers that let a page read the answer."""
        origin = headers.get(b"origin")
        if origin is None or not self.state.settings.allowed_origins or not self._allowed(origin, ""):
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin"),
                (b"access-control-allow-headers", headers.get(b"access-control-request-headers", ALLOWED_HEADERS)),
                (b"access-control-allow-methods", b"GET, POST, DELETE"), (b"access-control-max-age", b"600")]

    def _preflight(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        return (scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
                and b"origin" in headers and bool(self._cors(headers)))


class _Answer:
    """Sends what the app sends, and knows how far it got."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]):
        self._send, self._headers = send, headers
        self.status, self._stream, self._done = 0, False, False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._stream = any(key == b"content-type" and value.startswith(b"text/event-stream")
                               for key, value in message["headers"])
            if self._headers:
                message = {**message, "headers": [*message["headers"], *self._headers]}
        elif not message.get("more_body"):
            self._done = True
        await self._send(message)

    async def simple(self, status: int, body: bytes = b"", headers: list[tuple[bytes, bytes]] | None = None) -> None:
        await self._begin(status, body, headers or [])
        await self.send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Everything that the client is to see, with the exchange left open."""
        await self.send({"type": "http.response.start", "status": status, "headers": [
            (b"content-length", str(len(body)).encode()), *headers]})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def error(self, error: ApiError, receive: Receive | None = None) -> None:
        """As the whole answer; as the last event of a stream that has begun. receive: what the client still sends is
        read from there, for a while, where the answer closes the connection: closing on unread bytes resets it, and
        the client may lose the answer with them."""
        if not self.status:
            headers = [(key.encode(), value.encode()) for key, value in error.headers.items()]
            headers.append((b"content-type", b"application/json"))
            await self._begin(error.status, orjson.dumps(error.body), headers)
            if receive is not None and error.headers.get("connection") == "close":
                await _drop_body(receive)
            await self.send({"type": "http.response.body", "body": b""})
        elif self._stream and not self._done:
            await self.send({"type": "http.response.body", "body": b"data: " + orjson.dumps(error.body) + b"\n\n"})
            self.status = error.status


async def _drop_body(receive: Receive) -> None:
    """Read a request to its end, or until its client leaves, for LINGER_SECONDS at most."""
    async def rest() -> None:
        while (await receive()).get("more_body"):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), LINGER_SECONDS)


def _authority(origin: str) -> str:
    """Name and port of an Origin header; "" where it is none, as `null`, which pages without an origin send."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _name(host: str) -> str:
    """A Host header without its port, in small letters."""
    host = host.lower()
    if host.startswith("["):
        return host[:host.find("]") + 1]
    return host.rpartition(":")[0] if ":" in host else host
