"""Errors as OpenAI's API words them: {"error": {message, type, param, code}}, from ours."""
from __future__ import annotations

from typing import Any

from edge_runtime.apps.model_host import UnknownModelError
from edge_runtime.errors import (
    CancelledError,
    ChatTemplateError,
    ContextLengthError,
    CorruptModelError,
    DeviceError,
    EdgeRuntimeError,
    EngineStoppedError,
    InvalidRequestError,
    MissingExtraError,
    ModelNotFoundError,
    OutOfMemoryError,
    TokenizerError,
)

PROMPT = "messages"  # what chat completions call it; other routes have their own name for it
PROMPT_NAMES = {"/v1/completions": "prompt", "/v1/embeddings": "input", "/v1/responses": "input"}
FORMAT_NAMES = {"/v1/responses": "text.format"}


class ApiError(Exception):
    """An answer that is an error. status: of HTTP; type, param, code: as in OpenAI's error bodies."""

    def __init__(self, status: int, message: str, *, type: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", type="server_error", code="server_shutdown",
                    headers={"retry-after": "5"})


def api_error(error: BaseException, path: str = "") -> ApiError:
    """The answer for whatever went wrong on a route."""
    found = _api_error(error)
    if found.param == PROMPT and not isinstance(error, ApiError):
        found.param = PROMPT_NAMES.get(path, PROMPT)
    elif found.param == "grammar":  # requests know it by where they ask for it
        found.param = FORMAT_NAMES.get(path, "response_format")
    elif found.param == "template":
        found.param = "chat_template_kwargs"
    elif path == "/v1/embeddings" and found.message.startswith("texts["):
        found.message = "input" + found.message.removeprefix("texts")
        found.param = found.message.partition("]")[0] + "]"
    return found


def _api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, UnknownModelError):
        return ApiError(404, f"The model {error.value!r} does not exist: {text}", param="model", code="model_not_found")
    if isinstance(error, ContextLengthError):
        return ApiError(400, text, param=PROMPT, code="context_length_exceeded")
    if isinstance(error, InvalidRequestError):
        return ApiError(400, text, param=error.parameter, code="invalid_value")
    if isinstance(error, ChatTemplateError):
        return ApiError(400, text, param="messages", code="chat_template_error")
    if isinstance(error, TokenizerError):
        return ApiError(400, text, code="invalid_value")
    if isinstance(error, MissingExtraError):
        return ApiError(501, text, type="server_error", code="missing_dependency")
    if isinstance(error, CancelledError):
        return ApiError(499, text, type="server_error", code="cancelled")
    if isinstance(error, EngineStoppedError):
        return ApiError(503, text, type="server_error", code="engine_stopped", headers={"retry-after": "1"})
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, text, type="server_error", code="out_of_memory")
    if isinstance(error, (ModelNotFoundError, CorruptModelError)):
        return ApiError(503, text, type="server_error", code="model_not_loadable")
    if isinstance(error, DeviceError):
        return ApiError(500, text, type="server_error", code="device_error")
    if isinstance(error, EdgeRuntimeError):
        return ApiError(500, text, type="server_error", code="runtime_error")
    return ApiError(500, "The server failed while it answered; its log says how.", type="server_error",
                    code="internal_error")
