"""POST /v1/embeddings: final hidden states, pooled."""
from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.apps.server.completions import prompts_of
from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.io import json_response, leased, read_body, unless_gone
from edge_runtime.apps.server.schemas import EMBEDDING_REQUEST

if TYPE_CHECKING:
    from edge_runtime.apps.server.state import ServerState
    from edge_runtime.llm import LLM


async def embeddings(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, EMBEDDING_REQUEST, state.settings.max_body_bytes)
    inputs = prompts_of(body["input"])
    async with contextlib.AsyncExitStack() as stack:
        llm = await leased(request, stack, state.host, body["model"])
        return await unless_gone(request, _answer(llm, inputs, body, state))


async def _answer(llm: LLM, inputs: list[Any], body: dict[str, Any], state: ServerState) -> Response:
    counts = await asyncio.to_thread(lambda: [
        len(llm.tokenize(one) if isinstance(one, str) else one) for one in inputs])
    vectors = await llm.aembed(inputs, pooling=body.get("pooling") or "mean")
    size = body.get("dimensions")
    if size is not None:
        if size > vectors.shape[1]:
            raise ApiError(400, f"dimensions={size}: this model's vectors have {vectors.shape[1]}.", param="dimensions",
                           code="invalid_value")
        vectors = vectors[:, :size]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    vectors = np.ascontiguousarray(vectors, "<f4")
    plain = body.get("encoding_format") != "base64"
    data = [{"object": "embedding", "index": i,
             "embedding": vector.tolist() if plain else base64.b64encode(vector.tobytes()).decode()}
            for i, vector in enumerate(vectors)]
    state.metrics.prompt_tokens += sum(counts)
    return json_response({"object": "list", "data": data, "model": body["model"],
                          "usage": {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}})
