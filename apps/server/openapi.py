"""The OpenAPI 3.1 page of the server, from the schemas that requests are checked by."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_runtime import __version__
from edge_runtime.apps.server.schemas import (
    ANY_OBJECT,
    CHAT_REQUEST,
    COMPLETION_REQUEST,
    COMPONENTS,
    EMBEDDING_REQUEST,
    RESPONSE_REQUEST,
    STRING,
    Schema,
    nullable,
    obj,
    ref,
)

_INT: Schema = {"type": "integer"}
EVENT = obj({"data": {"type": "string", "description": "A chunk as JSON, at the end [DONE]."}, "event": STRING},
            ("data",), closed=False)
_USAGE = obj({"prompt_tokens": _INT, "completion_tokens": _INT, "total_tokens": _INT,
              "prompt_tokens_details": ANY_OBJECT}, ("prompt_tokens", "total_tokens"), closed=False)
_FINISH: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
_HEAD = {"id": STRING, "created": _INT, "model": STRING, "system_fingerprint": STRING, "usage": ref("Usage"),
         "edge_runtime": {"type": "object", "description": "Seconds and rates, and where tokens left the network."}}
_LISTED = obj({"id": STRING, "object": {"type": "string", "enum": ["model"]}, "created": _INT, "owned_by": STRING,
               "edge_runtime": ANY_OBJECT}, ("id", "object", "created", "owned_by"), closed=False)

ANSWERS: dict[str, Schema] = {
    "Error": obj({"error": obj({"message": STRING, "type": STRING, "param": nullable(STRING),
                                "code": nullable(STRING)}, ("message", "type", "param", "code"))}, ("error",)),
    "Usage": _USAGE,
    "Model": _LISTED,
    "ModelList": obj({"object": {"type": "string", "enum": ["list"]},
                      "data": {"type": "array", "items": ref("Model")}}, ("object", "data")),
    "ChatCompletion": obj({
        **_HEAD, "object": {"type": "string", "enum": ["chat.completion"]},
        "choices": {"type": "array", "minItems": 1, "items": obj({
            "index": _INT, "finish_reason": _FINISH, "logprobs": nullable(ANY_OBJECT),
            "message": obj({"role": {"type": "string", "enum": ["assistant"]}, "content": nullable(STRING),
                            "refusal": {"type": "null"}, "reasoning_content": STRING,
                            "tool_calls": {"type": "array", "items": ref("ToolCall")}},
                           ("role", "content"))}, ("index", "message", "finish_reason", "logprobs"))}},
        ("id", "object", "created", "model", "choices", "usage")),
    "Completion": obj({
        **_HEAD, "object": {"type": "string", "enum": ["text_completion"]},
        "choices": {"type": "array", "items": obj({
            "index": _INT, "text": STRING, "logprobs": nullable(ANY_OBJECT), "finish_reason": _FINISH},
            ("index", "text", "logprobs", "finish_reason"))}},
        ("id", "object", "created", "model", "choices", "usage")),
    "EmbeddingList": obj({
        "object": {"type": "string", "enum": ["list"]}, "model": STRING, "usage": ref("Usage"),
        "data": {"type": "array", "items": obj({
            "object": {"type": "string", "enum": ["embedding"]}, "index": _INT,
            "embedding": {"anyOf": [{"type": "array", "items": {"type": "number"}},
                                    {"type": "string", "description": "Base64 of little-endian float32."}]}},
            ("object", "index", "embedding"))}}, ("object", "data", "model", "usage")),
    "Response": obj({
        "id": STRING, "object": {"type": "string", "enum": ["response"]}, "created_at": _INT, "model": STRING,
        "status": {"type": "string", "enum": ["completed", "incomplete"]},
        "output": {"type": "array", "items": obj({"id": STRING, "type": {
            "type": "string", "enum": ["message", "function_call"]}}, ("id", "type"), closed=False)},
        "usage": obj({"input_tokens": _INT, "output_tokens": _INT, "total_tokens": _INT},
                     ("input_tokens", "output_tokens", "total_tokens"), closed=False)},
        ("id", "object", "created_at", "status", "model", "output", "usage"), closed=False),
    "Health": obj({"status": {"type": "string", "enum": ["ok", "loading", "no model", "closing"]},
                   "model": nullable(STRING), "requests": _INT, "uptime": {"type": "number"},
                   "engine": ANY_OBJECT, "kv": ANY_OBJECT}, ("status", "model", "requests", "uptime")),
}


def page(models: Sequence[str], needs_key: bool) -> dict[str, Any]:
    """The page of a server that offers these models."""
    paths = {
        "/v1/chat/completions": {"post": _post("Reply to a conversation", CHAT_REQUEST, "ChatCompletion", models)},
        "/v1/completions": {"post": _post("Continue a text", COMPLETION_REQUEST, "Completion", models)},
        "/v1/embeddings": {"post": _post("Texts to vectors", EMBEDDING_REQUEST, "EmbeddingList", models, stream=False)},
        "/v1/responses": {"post": _post("Reply, and keep the reply to be continued", RESPONSE_REQUEST, "Response",
                                        models)},
        "/v1/responses/{name}": {"parameters": [_name("A response's id")],
                                 "get": _get("A kept response", "Response", 404),
                                 "delete": _get("Forget a response", None, 404)},
        "/v1/models": {"get": _get("The models that requests may name", "ModelList")},
        "/v1/models/{name}": {"parameters": [_name("A model's name")], "get": _get("One model", "Model", 404)},
        "/health": {"get": {**_get("Whether requests are answered", "Health"), "security": []}},
        "/metrics": {"get": {"summary": "Prometheus", "responses": {
            "200": {"description": "Metrics", "content": {"text/plain": {"schema": STRING}}}, **_errors(401)}}},
    }
    paths["/health"]["get"]["responses"]["503"] = {  # type: ignore[index]
        "description": "Not now", "content": {"application/json": {"schema": ref("Health")}}}
    out: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Edge Runtime", "version": __version__,
                 "description": "An OpenAI-compatible server for models on this machine. Where a request may ask for a "
                                "stream, the answer is then text/event-stream."},
        "paths": paths, "components": {"schemas": {**COMPONENTS, **ANSWERS}}}
    if needs_key:
        out["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        out["security"] = [{"key": []}]
    return out


def _post(summary: str, body: Schema, answer: str, models: Sequence[str], *, stream: bool = True) -> dict[str, Any]:
    named = {**body, "properties": {**body["properties"], "model": {**body["properties"]["model"], "enum": [*models]}}}
    content: dict[str, Any] = {"application/json": {"schema": ref(answer)}}
    if stream:
        content["text/event-stream"] = {"schema": EVENT}
    return {"summary": summary, "requestBody": {"required": True, "content": {"application/json": {"schema": named}}},
            "responses": {"200": {"description": summary, "content": content},
                          **_errors(400, 401, 403, 404, 413, 415, 429, 500, 501, 503)}}


def _get(summary: str, answer: str | None, *more: int) -> dict[str, Any]:
    schema = ref(answer) if answer else ANY_OBJECT
    good = {"description": summary, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "responses": {"200": good, **_errors(401, 403, *more)}}


def _errors(*codes: int) -> dict[str, Any]:
    return {str(code): {"description": "Error", "content": {"application/json": {"schema": ref("Error")}}}
            for code in codes}


def _name(what: str) -> dict[str, Any]:
    return {"name": "name", "in": "path", "required": True, "description": what, "schema": {**STRING, "minLength": 1}}
