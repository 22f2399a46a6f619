"""POST /v1/responses: text and function calls in the newer form of OpenAI's API, and replies that continue others."""
from __future__ import annotations

import contextlib
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.apps.server.chat import ChatJob
from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.io import EventStream, json_response, leased, read_body, unless_gone
from edge_runtime.apps.server.messages import rendered_messages
from edge_runtime.apps.server.parameters import asked, check_placement, grammar_of
from edge_runtime.apps.server.replies import measured, pieces, streams, token_logprobs, whole
from edge_runtime.apps.server.response_events import ResponseEvents
from edge_runtime.apps.server.schemas import RESPONSE_REQUEST
from edge_runtime.apps.server.tool_formats import tool_use
from edge_runtime.outcome import Stats

if TYPE_CHECKING:
    from edge_runtime.apps.server.state import ServerState
    from edge_runtime.llm import LLM

REQUIRED = {"message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output")}  # of input items, by their type


@dataclass
class ResponseStore:
    """Replies that were not asked to be forgotten, the last `limit` of them: (response, conversation up to its end)."""

    limit: int
    _kept: OrderedDict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = field(default_factory=OrderedDict)

    def keep(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        self._kept[response["id"]] = (response, messages)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)

    def find(self, name: str, param: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if name not in self._kept:
            raise ApiError(400 if param else 404, f"Response with id {name!r:.80} not found.", param=param,
                           code="previous_response_not_found" if param else "response_not_found")
        return self._kept[name]

    def forget(self, name: str) -> None:
        self.find(name)
        del self._kept[name]


async def responses(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, RESPONSE_REQUEST, state.settings.max_body_bytes)
    before = []
    if body.get("previous_response_id"):
        before = state.responses.find(body["previous_response_id"], "previous_response_id")[1]
    talk = [*before, *_messages(body["input"])]
    async with contextlib.AsyncExitStack() as stack:
        llm = await leased(request, stack, state.host, body["model"])
        job = _job(body, llm, talk)
        response = _begun(body)

        def finish(output: list[dict[str, Any]], stats: Stats, reason: str) -> dict[str, Any]:
            done = _ended(response, output, stats, reason)
            if body.get("store") is not False:
                state.responses.keep(done, [*talk, *_as_messages(output)])
            return done

        if not job.asked.stream:
            return await unless_gone(request, _answer(job, state, finish))
        generations = await unless_gone(request, streams(job.asks, state.settings.stream_interval))
        return EventStream(_events(job, pieces(generations, state.metrics), response, finish), stack.pop_all().aclose)


async def response(request: Request) -> Response:
    """GET and DELETE of one that is kept."""
    state: ServerState = request.app.state.server
    name = request.path_params["name"]
    if request.method == "DELETE":
        state.responses.forget(name)
        return json_response({"id": name, "object": "response", "deleted": True})
    return json_response(state.responses.find(name)[0])


def _job(body: dict[str, Any], llm: LLM, talk: list[dict[str, Any]]) -> ChatJob:
    check_placement(body, llm)
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    given = [{"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
             for tool in body.get("tools") or ()]
    tools = tool_use(llm, given, choice, body.get("parallel_tool_calls"))
    grammar = grammar_of((body.get("text") or {}).get("format"))
    if tools is not None and tools.grammar is not None:
        if grammar is not None:
            raise ApiError(400, "A reply cannot be held to 'text.format' and to tool calls at once.", param="text",
                           code="invalid_value")
        grammar = tools.grammar
    top = body.get("top_logprobs")
    if top is None and "message.output_text.logprobs" in (body.get("include") or ()):
        top = 0
    # stream_options of this API know no usage: its last event always has it.
    plain = {key: value for key, value in body.items() if key != "stream_options"}
    found = asked(plain, max_tokens=body.get("max_output_tokens"), logprobs=top, grammar=grammar)
    system = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    return ChatJob(llm, body["model"], found, rendered_messages(llm, [*system, *talk], tools),
                   body.get("chat_template_kwargs"), tools, top)


def _messages(given: Any) -> list[dict[str, Any]]:
    """Input items as chat messages; calls that follow each other belong to one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    out: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        kind = item.get("type") or "message"
        for name in REQUIRED.get(kind, ()):
            if name not in item:
                raise ApiError(400, f"Missing required parameter: 'input[{i}].{name}'.", param=f"input[{i}].{name}",
                               code="missing_required_parameter")
        if kind == "message":
            out.append({"role": item["role"], "content": item["content"]})
        elif kind == "function_call":
            call = {"id": item["call_id"], "type": "function",
                    "function": {"name": item["name"], "arguments": item["arguments"]}}
            if out and out[-1].get("tool_calls"):
                out[-1]["tool_calls"].append(call)
            else:
                out.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            out.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    if not out:
        raise ApiError(400, "'input' holds no message.", param="input", code="invalid_value")
    return out


def _as_messages(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A reply's items, for the conversation that continues it."""
    items = [{"type": "message", "role": "assistant", "content": item["content"][0]["text"]}
             if item["type"] == "message" else item for item in output]
    return _messages(items) if items else []


def _begun(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "status": "in_progress",
        "background": False, "error": None, "incomplete_details": None, "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"), "model": body["model"], "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": body.get("previous_response_id"), "reasoning": {"effort": None, "summary": None},
        "store": body.get("store") is not False, "temperature": body.get("temperature"),
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto", "tools": body.get("tools") or [],
        "top_logprobs": body.get("top_logprobs") or 0, "top_p": body.get("top_p"), "truncation": "disabled",
        "usage": None, "user": body.get("user"), "metadata": body.get("metadata") or {}}


def _ended(response: dict[str, Any], output: list[dict[str, Any]], stats: Stats, reason: str) -> dict[str, Any]:
    cut = reason == "length"
    return {**response, "status": "incomplete" if cut else "completed", "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {"input_tokens": stats.prompt_tokens,
                      "input_tokens_details": {"cached_tokens": stats.cached_tokens},
                      "output_tokens": stats.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                      "total_tokens": stats.prompt_tokens + stats.completion_tokens},
            "edge_runtime": measured([stats])}


async def _answer(job: ChatJob, state: ServerState, finish: Any) -> Response:
    reply = (await whole(job.asks, state.metrics))[0]
    events = ResponseEvents()
    logprobs = None
    if job.top_logprobs is not None and reply.logprobs is not None:
        logprobs = token_logprobs(job.llm, reply.logprobs, job.top_logprobs)
    deltas = [{"content": reply.text}] if job.tools is None else job.tools.parser().push(reply)
    for delta in deltas:
        events.delta(delta, logprobs)
        logprobs = None
    events.end(reply.finish_reason)
    return json_response(finish(events.output, reply.stats, reply.finish_reason))


async def _events(job: ChatJob, parts: AsyncIterator[tuple[int, Any]], response: dict[str, Any],
                  finish: Any) -> AsyncIterator[bytes]:
    events = ResponseEvents()
    parser = None if job.tools is None else job.tools.parser()
    out = events.response("response.created", response) + events.response("response.in_progress", response)
    async with contextlib.aclosing(parts):  # type: ignore[type-var]
        async for _, piece in parts:
            logprobs = None
            if job.top_logprobs is not None and piece.logprobs:
                logprobs = token_logprobs(job.llm, piece.logprobs, job.top_logprobs)
            if parser is not None:
                deltas = parser.push(piece)
            else:
                deltas = [{"content": piece.text}] if piece.text or logprobs else []
            for delta in deltas:
                out += events.delta(delta, logprobs)
                logprobs = None
            if piece.finish_reason is not None:
                out += events.end(piece.finish_reason)
                done = finish(events.output, piece.stats, piece.finish_reason)
                out += events.response(f"response.{done['status']}", done)
            if out:
                yield out
                out = b""
