"""POST /v1/chat/completions."""
from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.io import DONE, EventStream, event, json_response, leased, read_body, unless_gone
from edge_runtime.apps.server.messages import rendered_messages
from edge_runtime.apps.server.parameters import Asked, asked, check_placement, grammar_of, reply_params
from edge_runtime.apps.server.reasoning import ReasoningParser, opened
from edge_runtime.apps.server.replies import FINISH, Ask, measured, pieces, streams, token_logprobs, usage, whole
from edge_runtime.apps.server.schemas import CHAT_REQUEST
from edge_runtime.apps.server.tool_formats import ToolUse, tool_use
from edge_runtime.arguments import checked_variables
from edge_runtime.outcome import Stats
from edge_runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from edge_runtime.apps.server.state import ServerState
    from edge_runtime.llm import LLM


@dataclass(frozen=True)
class ChatJob:
    """One request, understood. ask: starts a reply; top_logprobs: None where none are reported; thinking: None where
    thoughts stay in the text, else whether the prompt has opened one."""

    llm: LLM
    model: str
    asked: Asked
    messages: list[dict[str, Any]]
    template: Mapping[str, Any] | None
    tools: ToolUse | None
    top_logprobs: int | None
    thinking: bool | None = None

    @property
    def asks(self) -> list[Ask]:
        return [partial(self._ask, reply_params(self.asked.params, i)) for i in range(self.asked.n)]

    async def _ask(self, params: SamplingParams, stream: bool) -> Any:
        return await self.llm.achat(
            self.messages, params, stream=stream, tools=self.tools.schemas if self.tools else None,
            template=self.template, priority=self.asked.priority)

    def reasoning_parser(self) -> ReasoningParser | None:
        return None if self.thinking is None else ReasoningParser(self.thinking, self.llm.tokenizer)


async def chat_completions(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, CHAT_REQUEST, state.settings.max_body_bytes)
    async with contextlib.AsyncExitStack() as stack:
        llm = await leased(request, stack, state.host, body["model"])
        job = _job(body, llm)
        if body.get("reasoning_format") == "separate":
            job = replace(job, thinking=await asyncio.to_thread(_opens_thought, job))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
                "model": job.model, "system_fingerprint": "edge-runtime"}
        if not job.asked.stream:
            return await unless_gone(request, _answer(job, state, head))
        generations = await unless_gone(request, streams(job.asks, state.settings.stream_interval))
        return EventStream(_events(job, pieces(generations, state.metrics), head), stack.pop_all().aclose)


def _job(body: dict[str, Any], llm: LLM) -> ChatJob:
    check_placement(body, llm)
    top = None
    if body.get("logprobs"):
        top = body.get("top_logprobs") or 0
    elif body.get("top_logprobs") is not None:
        raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value")
    grammar = grammar_of(body.get("response_format"))
    tools = tool_use(llm, body.get("tools"), body.get("tool_choice"), body.get("parallel_tool_calls"))
    if tools is not None and tools.grammar is not None:
        if grammar is not None:
            raise ApiError(400, "A reply cannot be held to 'response_format' and to tool calls at once.",
                           param="response_format", code="invalid_value")
        grammar = tools.grammar
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    found = asked(body, max_tokens=limit, logprobs=top, grammar=grammar)
    return ChatJob(llm, body["model"], found, rendered_messages(llm, body["messages"], tools),
                   body.get("chat_template_kwargs"), tools, top)


def _opens_thought(job: ChatJob) -> bool:
    """Whether the prompt ends inside a thought. A reply that is held to a form from its first token has none."""
    grammar, found = job.asked.params.grammar, job.llm.chat_template
    if found is None or (grammar is not None and not (job.tools is not None and job.tools.optional)):
        return False
    return opened(found.render(job.messages, tools=job.tools.schemas if job.tools else None,
                               **checked_variables(job.template)))


async def _answer(job: ChatJob, state: ServerState, head: dict[str, Any]) -> Response:
    replies = await whole(job.asks, state.metrics)
    choices = []
    for i, reply in enumerate(replies):
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        reason = FINISH[reply.finish_reason]
        reasoning = job.reasoning_parser()
        if reasoning is not None:
            thought, reply = reasoning.push(reply)
            message["content"] = reply.text
            if thought:
                message["reasoning_content"] = thought
        if job.tools is not None:
            text, calls = job.tools.parsed(reply)
            if calls:
                message.update(content=text or None, tool_calls=calls)
                reason = "tool_calls" if reason == "stop" else reason
            else:
                message["content"] = text
        logprobs = None if job.top_logprobs is None or reply.logprobs is None else {
            "content": token_logprobs(job.llm, reply.logprobs, job.top_logprobs), "refusal": None}
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason})
    stats = [reply.stats for reply in replies]
    return json_response({**head, "choices": choices, "usage": usage(stats), "edge_runtime": measured(stats)})


async def _events(job: ChatJob, found: AsyncIterator[tuple[int, Any]], head: dict[str, Any]) -> AsyncIterator[bytes]:
    """Chunks as OpenAI's API sends them. What comes at one time is sent in one piece."""
    head = {**head, "object": "chat.completion.chunk"}
    rest = {"usage": None} if job.asked.include_usage else {}
    thoughts = [job.reasoning_parser() for _ in range(job.asked.n)]
    parsers = [job.tools.parser() for _ in range(job.asked.n)] if job.tools is not None else None
    start = orjson.dumps(head)[:-1] + b',"choices":[{"index":'
    end = b"}]" + (b',"usage":null' if rest else b"") + b"}\n\n"
    stats: list[Stats] = []
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        return b"".join((b"data: ", start, str(index).encode(), b',"delta":', orjson.dumps(delta), b',"logprobs":',
                         orjson.dumps(logprobs), b',"finish_reason":', orjson.dumps(reason), end))

    async with contextlib.aclosing(found):  # type: ignore[type-var]
        async for i, piece in found:
            out = []
            if i not in begun:
                begun.add(i)
                out.append(chunk(i, {"role": "assistant", "content": "", "refusal": None}))
            logprobs = None
            if job.top_logprobs is not None and piece.logprobs:
                logprobs = {"content": token_logprobs(job.llm, piece.logprobs, job.top_logprobs), "refusal": None}
            deltas: list[dict[str, Any]] = []
            reasoning = thoughts[i]
            if reasoning is not None:
                thought, piece = reasoning.push(piece)
                if thought:
                    deltas.append({"reasoning_content": thought})
            if parsers is not None:
                deltas += parsers[i].push(piece)
            elif piece.text:
                deltas.append({"content": piece.text})
            if logprobs and not deltas:
                deltas.append({"content": ""})
            for delta in deltas:
                out.append(chunk(i, delta, logprobs))
                logprobs = None
            if piece.finish_reason is not None:
                stats.append(piece.stats)
                called = parsers is not None and parsers[i].calls and piece.finish_reason == "stop"
                out.append(chunk(i, {}, None, "tool_calls" if called else FINISH[piece.finish_reason]))
                if len(stats) == job.asked.n:
                    if job.asked.include_usage:
                        out.append(event({**head, "choices": [], "usage": usage(stats),
                                          "edge_runtime": measured(stats)}))
                    out.append(DONE)
            if out:
                yield b"".join(out)
