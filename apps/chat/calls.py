"""From an HTTP request to a plain function and back: bodies are checked, errors become answers that say what to do."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_runtime.apps.chat import errors
from edge_runtime.apps.chat.json_input import read_json
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError, MissingExtraError, ModelNotFoundError

MAX_JSON = 16 << 20  # a message of that size has four million tokens
MAX_KEY = 1 << 63  # SQLite's integers
_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (errors.NotFoundError, 404), (ModelNotFoundError, 404), (errors.DataInUseError, 503), (errors.DiskFullError, 507),
    (errors.AttachmentError, 422), (errors.ImportFileError, 422), (InvalidRequestError, 400),
    (MissingExtraError, 501))


class Body:
    """A JSON object whose values are taken by name and type. Raises InvalidRequestError."""

    def __init__(self, values: Any):
        if not isinstance(values, dict):
            raise InvalidRequestError("body", values, "a JSON object")
        self.values: dict[str, Any] = values

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise InvalidRequestError(name, value, "text")
        return value

    def number(self, name: str) -> int:
        value = self.optional_number(name)
        if value is None:
            raise InvalidRequestError(name, value, "a whole number")
        return value

    def optional_number(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63):
            raise InvalidRequestError(name, value, "a whole number")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise InvalidRequestError(name, value, "an object")
        return value


async def raw_body(request: Request, limit: int) -> bytes:
    """Raises InvalidRequestError past `limit`, before more is read."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise InvalidRequestError("body", f"more than {limit >> 20} MiB", f"at most {limit >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


async def json_body(request: Request) -> Body:
    raw = await raw_body(request, MAX_JSON)
    try:
        return Body(read_json(raw or b"{}"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", raw[:40], f"JSON ({error})") from error


def endpoint(function: Callable[..., Any]) -> Callable[[Request], Any]:
    """A route that calls `function(chat, request, body)`: on a worker thread, or on the loop where it is a
    coroutine."""

    @functools.wraps(function)
    async def route(request: Request) -> Response:
        try:
            body = await json_body(request) if request.method in ("POST", "PUT", "PATCH") else Body({})
            chat = request.app.state.chat
            if inspect.iscoroutinefunction(function):
                found = await function(chat, request, body)
            else:
                found = await run_in_threadpool(function, chat, request, body)
        except (EdgeRuntimeError, OSError, MemoryError) as error:
            return failed(error)
        return found if isinstance(found, Response) else JSONResponse(found if found is not None else {})

    return route


def failed(error: BaseException) -> JSONResponse:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return JSONResponse({"error": {"message": str(error) or type(error).__name__, "type": type(error).__name__}},
                        status_code=status)


def key(request: Request, name: str = "key") -> int:
    """A number in the path. Raises NotFoundError for one that SQLite cannot hold."""
    return stored_key(request.path_params[name])


def stored_key(text: object) -> int:
    """The same for a number as text, of a query."""
    digits = str(text)
    if not digits.isdecimal() or len(digits) > 19 or int(digits) >= MAX_KEY:
        raise errors.NotFoundError("entry", digits[:40])
    return int(digits)
