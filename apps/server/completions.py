"""POST /v1/completions: text to continue, as it is."""
from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.io import DONE, EventStream, event, json_response, leased, read_body, unless_gone
from edge_runtime.apps.server.parameters import Asked, asked, check_placement, grammar_of, reply_params
from edge_runtime.apps.server.replies import FINISH, Ask, measured, pieces, streams, whole
from edge_runtime.apps.server.schemas import COMPLETION_REQUEST
from edge_runtime.outcome import Stats
from edge_runtime.sampling import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from edge_runtime.apps.server.state import ServerState
    from edge_runtime.llm import LLM

DEFAULT_TOKENS = 16  # OpenAI's
MAX_REPLIES = 2048  # prompts times n


async def completions(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, COMPLETION_REQUEST, state.settings.max_body_bytes)
    _refuse(body)
    limit = body.get("max_tokens")
    found = asked(body, max_tokens=DEFAULT_TOKENS if limit is None else limit, logprobs=body.get("logprobs"),
                  grammar=grammar_of(body.get("response_format")))
    prompts = prompts_of(body["prompt"])
    if len(prompts) * found.n > MAX_REPLIES:
        raise ApiError(400, f"{len(prompts)} prompts x {found.n} replies are more than {MAX_REPLIES}.", param="n",
                       code="invalid_value")
    async with contextlib.AsyncExitStack() as stack:
        llm = await leased(request, stack, state.host, body["model"])
        check_placement(body, llm)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                "model": body["model"], "system_fingerprint": "edge-runtime"}
        asks = [partial(_ask, llm, prompt, reply_params(found.params, i), found.priority)
                for prompt in prompts for i in range(found.n)]
        echoes = [_text(llm, prompt) if body.get("echo") else "" for prompt in prompts for _ in range(found.n)]
        if not found.stream:
            return await unless_gone(request, _answer(llm, asks, echoes, found, state, head))
        generations = await unless_gone(request, streams(asks, state.settings.stream_interval))
        return EventStream(_events(llm, pieces(generations, state.metrics), echoes, found, head),
                           stack.pop_all().aclose)


def prompts_of(value: Any) -> list[Any]:
    """A list of prompts, each a text or token ids, from what a body may hold."""
    if isinstance(value, str):
        return [value]
    return [value] if isinstance(value[0], int) else list(value)


def _refuse(body: dict[str, Any]) -> None:
    if body.get("suffix"):
        raise ApiError(400, "'suffix' is not supported.", param="suffix", code="unsupported_parameter")
    if body.get("best_of") is not None and body["best_of"] != (body.get("n") or 1):
        raise ApiError(400, "'best_of' is only supported where it equals 'n'.", param="best_of",
                       code="unsupported_parameter")
    if body.get("echo") and body.get("logprobs") is not None:
        raise ApiError(400, "'echo' with 'logprobs' is not supported.", param="echo", code="unsupported_parameter")


async def _ask(llm: LLM, prompt: Any, params: SamplingParams, priority: str, stream: bool) -> Any:
    return await llm.agenerate(prompt, params, stream=stream, priority=priority)


def _text(llm: LLM, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else llm.detokenize(prompt, skip_special=False)


async def _answer(llm: LLM, asks: Sequence[Ask], echoes: list[str], found: Asked, state: ServerState,
                  head: dict[str, Any]) -> Response:
    replies = await whole(asks, state.metrics)
    choices = []
    for i, reply in enumerate(replies):
        logprobs = None if reply.logprobs is None else _logprobs(llm, reply.logprobs, len(echoes[i]))
        choices.append({"index": i, "text": echoes[i] + reply.text, "logprobs": logprobs,
                        "finish_reason": FINISH[reply.finish_reason]})
    stats = [reply.stats for reply in replies]
    return json_response({**head, "choices": choices, "usage": _usage(stats, found.n), "edge_runtime": measured(stats)})


async def _events(llm: LLM, parts: AsyncIterator[tuple[int, Any]], echoes: list[str], found: Asked,
                  head: dict[str, Any]) -> AsyncIterator[bytes]:
    start = orjson.dumps(head)[:-1] + b',"choices":[{"index":'
    end = b"}]" + (b',"usage":null' if found.include_usage else b"") + b"}\n\n"
    stats: dict[int, Stats] = {}
    offsets = [0] * len(echoes)
    async with contextlib.aclosing(parts):  # type: ignore[type-var]
        async for i, piece in parts:
            text = piece.text if offsets[i] else echoes[i] + piece.text
            reason = None if piece.finish_reason is None else FINISH[piece.finish_reason]
            logprobs = None if not piece.logprobs else _logprobs(llm, piece.logprobs, offsets[i])
            offsets[i] += len(text)
            out = []
            if text or reason or logprobs:
                out.append(b"".join((
                    b"data: ", start, str(i).encode(), b',"text":', orjson.dumps(text), b',"logprobs":',
                    orjson.dumps(logprobs, option=orjson.OPT_NON_STR_KEYS), b',"finish_reason":', orjson.dumps(reason),
                    end)))
            if piece.stats is not None:
                stats[i] = piece.stats
                if len(stats) == len(echoes):
                    ordered = [stats[k] for k in sorted(stats)]
                    if found.include_usage:
                        out.append(event({**head, "choices": [], "usage": _usage(ordered, found.n),
                                          "edge_runtime": measured(ordered)}))
                    out.append(DONE)
            if out:
                yield b"".join(out)


def _usage(stats: list[Stats], n: int) -> dict[str, Any]:
    """The prompt of n replies counts once."""
    prompt = sum(one.prompt_tokens for one in stats[::n])
    completion = sum(one.completion_tokens for one in stats)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in stats[::n])}}


def _logprobs(llm: LLM, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """As completions report them; text_offset counts characters from the beginning of the text."""

    def token(token_id: int) -> str:
        return llm.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    tokens = [token(p.token_id) for p in logprobs]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": [max(p.logprob, -9999.0) for p in logprobs],
            "top_logprobs": [{token(i): max(value, -9999.0) for i, value in p.top} for p in logprobs],
            "text_offset": offsets}
