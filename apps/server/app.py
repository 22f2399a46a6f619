"""The application: routes over one `ModelHost`, as an ASGI app that any program may mount."""
from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_runtime.apps.server.chat import chat_completions
from edge_runtime.apps.server.completions import completions
from edge_runtime.apps.server.embeddings import embeddings
from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.guard import Guard
from edge_runtime.apps.server.io import json_response
from edge_runtime.apps.server.metrics import CONTENT_TYPE
from edge_runtime.apps.server.openapi import page
from edge_runtime.apps.server.responses import response, responses
from edge_runtime.apps.server.settings import ServerSettings
from edge_runtime.apps.server.state import ServerState

if TYPE_CHECKING:
    from edge_runtime.apps.model_host import KnownModel, ModelHost


def create_app(host: ModelHost, settings: ServerSettings | None = None) -> Starlette:
    """The server's routes. `app.state.server` is its `ServerState`. The host is not closed with the app."""
    state = ServerState(host, settings or ServerSettings())
    routes = [
        Route("/health", health), Route("/metrics", metrics),
        Route("/v1/models", models), Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/responses/{name}", response, methods=["GET", "DELETE"]),
        Route("/openapi.json", openapi),
    ]
    state.paths = frozenset(route.path for route in routes)
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error},
                    middleware=[Middleware(Guard, state=state)])
    app.router.redirect_slashes = False
    app.state.server = state
    return app


async def health(request: Request) -> Response:
    """Whether requests would be answered: 200, or 503 while a model is loaded or the server ends."""
    state: ServerState = request.app.state.server
    host = state.host
    body: dict[str, Any] = {"status": "ok", "model": host.current, "requests": max(0, len(state.running) - 1),
                            "uptime": time.time() - state.started}
    if state.closing:
        body["status"] = "closing"
    elif host.llm is None:
        body["status"] = "loading" if host.switching else "no model"
    if host.llm is not None:
        engine = host.llm.status()
        body["engine"] = {"running": engine.running, "waiting": engine.waiting, "mode": engine.mode}
        body["kv"] = {"home": engine.kv_home, "pages_used": engine.pages_used, "pages_cached": engine.pages_cached,
                      "pages_total": engine.pages_total, "page_bytes": engine.page_bytes,
                      "device_bytes": engine.device_kv_bytes, "device_budget": engine.device_kv_budget}
    return json_response(body, 200 if body["status"] == "ok" else 503)


async def metrics(request: Request) -> Response:
    state: ServerState = request.app.state.server
    return Response(state.metrics.text(state.host, len(state.running)), headers={"content-type": CONTENT_TYPE})


async def models(request: Request) -> Response:
    host: ModelHost = request.app.state.server.host
    return json_response({"object": "list", "data": [_listed(one, host) for one in host.models()]})


async def model(request: Request) -> Response:
    host: ModelHost = request.app.state.server.host
    return json_response(_listed(host.known(request.path_params["name"]), host))


async def openapi(request: Request) -> Response:
    state: ServerState = request.app.state.server
    return json_response(page([one.name for one in state.host.models()], state.settings.api_key is not None))


def _listed(one: KnownModel, host: ModelHost) -> dict[str, Any]:
    """As OpenAI's API lists a model; `edge_runtime` is our extension."""
    extra: dict[str, Any] = {"source": one.source, "size_bytes": one.size_bytes, "open": one.name == host.current}
    if extra["open"] and host.llm is not None:
        extra["context"] = host.llm.context
    return {"id": one.name, "object": "model", "created": one.created, "owned_by": "edge-runtime",
            "edge_runtime": extra}


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Unknown request URL: {request.method} {request.url.path}.", "unknown_url"
    elif error.status_code == 405:
        message, code = f"Not allowed to {request.method} on {request.url.path}.", "method_not_allowed"
    answer = json_response(ApiError(error.status_code, message, code=code).body, error.status_code)
    for key, value in (error.headers or {}).items():
        answer.headers[key] = value
    return answer
