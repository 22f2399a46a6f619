"""Requests of an OpenAI batch file, answered by a model of this process."""
from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.backend import Backend
from edge_runtime.apps.summarizer.sources import Item
from edge_runtime.apps.summarizer.strategies import Job
from edge_runtime.errors import InvalidRequestError
from edge_runtime.sampling import SamplingParams

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_CHOICES = 128
# Said to the service, not to the model.
IGNORED = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "parallel_tool_calls", "stream_options"}
SHARED = {"temperature", "top_p", "stop", "seed", "n", "presence_penalty", "frequency_penalty", "logit_bias", "stream",
          "max_tokens", "top_k", "min_p", "repetition_penalty", "ignore_eos"}
FIELDS = {"/v1/chat/completions": SHARED | {"messages", "max_completion_tokens", "logprobs", "top_logprobs",
                                            "response_format", "tools", "tool_choice"},
          "/v1/completions": SHARED | {"prompt", "logprobs", "echo", "best_of", "suffix"},
          "/v1/embeddings": {"input", "encoding_format", "dimensions"}}


class Requests:
    """Makes jobs of a batch file's lines. created: seconds, for the answers that carry a time."""

    def __init__(self, backend: Backend, created: int, *, remote: bool = False):
        self.backend, self.created, self.remote = backend, created, remote

    def job(self, item: Item) -> Job:
        """Returns {"body", "text", ...}: the response's body. Raises InvalidRequestError for a body of wrong fields or
        types."""
        request = item.request
        assert request is not None
        url = request["url"]
        if url not in URLS:
            raise InvalidRequestError("url", url, f"one of {', '.join(URLS)}")
        if self.remote:
            [answer] = yield [Ask("post", [url, request["body"]])]
            return _result(answer.body, [answer])
        body = {key: value for key, value in request["body"].items() if value is not None and key not in IGNORED}
        unknown = sorted(set(body) - FIELDS[url])
        if unknown:
            raise InvalidRequestError(f"body.{unknown[0]}", body[unknown[0]],
                                      f"left out: {url} has no such field here")
        if body.get("stream"):
            raise InvalidRequestError("body.stream", body["stream"], "false in a batch")
        if url == "/v1/embeddings":
            return (yield from self._embeddings(item, body))
        return (yield from self._completions(item, body, chat=url == "/v1/chat/completions"))

    def _completions(self, item: Item, body: dict[str, Any], chat: bool) -> Job:
        count = _whole(body, "n", 1, 1, MAX_CHOICES)
        params = _params(body, item, chat)
        tools = _tools(body) if chat else None
        if chat:
            content: list[Any] = [_messages(body)]
        else:
            content = _prompts(body)
        asks = [Ask("chat" if chat else "complete", one, _numbered(params, i), chunk=i, tools=tools)
                for one in content for i in range(count)]
        answers = yield [Ask(ask.kind, ask.content, ask.params, 0, i, ask.tools) for i, ask in enumerate(asks)]
        choices = [_choice(i, answer, chat) for i, answer in enumerate(answers)]
        # A prompt is read once for all its choices, and counted once.
        prompt = sum(answer.prompt_tokens for answer in answers[::count])
        completion = sum(answer.completion_tokens for answer in answers)
        return _result({
            "id": ("chatcmpl-" if chat else "cmpl-") + identity(item), "created": self.created,
            "object": "chat.completion" if chat else "text_completion", "model": self.backend.model,
            "choices": choices, "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
                                          "total_tokens": prompt + completion}}, answers)

    def _embeddings(self, item: Item, body: dict[str, Any]) -> Job:
        if "dimensions" in body:
            raise InvalidRequestError("body.dimensions", body["dimensions"], "left out: vectors have the model's width")
        form = body.get("encoding_format", "float")
        if form not in ("float", "base64"):
            raise InvalidRequestError("body.encoding_format", form, "float or base64")
        answers = yield [Ask("embed", text, chunk=i) for i, text in enumerate(_prompts(body, "input"))]
        rows = [answer.values if form == "float" else
                base64.b64encode(struct.pack(f"<{len(answer.values)}f", *answer.values)).decode() for answer in answers]
        prompt = sum(answer.prompt_tokens for answer in answers)
        return _result({"object": "list", "model": self.backend.model,
                        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
                        "usage": {"prompt_tokens": prompt, "total_tokens": prompt}}, answers)


def identity(item: Item) -> str:
    """Names an answer: the same for the same line."""
    return blake2b(item.hash + item.name.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _result(body: Any, answers: list[Answer]) -> dict[str, Any]:
    return {"body": body, "text": answers[0].text, "chunks": len(answers), "parts": [],
            "complete": all(answer.finish_reason == "stop" for answer in answers),
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers)}


def _choice(index: int, answer: Answer, chat: bool) -> dict[str, Any]:
    reason = "length" if answer.finish_reason == "length" else "stop"
    if chat:
        return {"index": index, "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else {"content": answer.logprobs, "refusal": None},
                "finish_reason": reason}
    told = None
    if answer.logprobs is not None:
        told = {"tokens": [one["token"] for one in answer.logprobs],
                "token_logprobs": [one["logprob"] for one in answer.logprobs],
                "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]}
                                 for one in answer.logprobs]}
    return {"index": index, "text": answer.text, "logprobs": told, "finish_reason": reason}


def _params(body: Mapping[str, Any], item: Item, chat: bool) -> SamplingParams:
    """OpenAI's defaults (temperature and top_p 1). Without a seed, one that follows from the line: the same line
    gives the same text, whenever it is run again."""
    seed = body.get("seed")
    if seed is None:
        seed = int.from_bytes(item.hash[:4], "little")
    limit = body.get("max_completion_tokens", body.get("max_tokens", None if chat else 16))
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InvalidRequestError("body.max_tokens", limit, "a whole number from 1 up")
    bias = body.get("logit_bias", {})
    if not isinstance(bias, dict) or not all(str(token).isdecimal() for token in bias):
        raise InvalidRequestError("body.logit_bias", bias, "an object of token ids and numbers")
    named = {name: body[name] for name in ("presence_penalty", "frequency_penalty", "top_k", "min_p",
                                           "repetition_penalty", "ignore_eos") if name in body}
    if "echo" in body or "suffix" in body or body.get("best_of", 1) != 1:
        raise InvalidRequestError("body", "echo, suffix or best_of", "left out: not supported")
    return SamplingParams(max_tokens=limit, temperature=body.get("temperature", 1.0), top_p=body.get("top_p", 1.0),
                          stop=body.get("stop", ()), seed=seed, logprobs=_logprobs(body, chat),
                          logit_bias={int(token): value for token, value in bias.items()},
                          **_grammar(body), **named)


def _numbered(params: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one prompt differ in their seeds."""
    return SamplingParams.of(params, {"seed": (params.seed or 0) + choice}) if choice else params


def _logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return body.get("logprobs")
    wanted = body.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise InvalidRequestError("body.logprobs", wanted, "true or false")
    return _whole(body, "top_logprobs", 0, 0, 20) if wanted else None


def _grammar(body: Mapping[str, Any]) -> dict[str, Any]:
    told = body.get("response_format", {"type": "text"})
    kind = told.get("type") if isinstance(told, dict) else None
    if kind == "text":
        return {}
    from edge_runtime.structured import Grammar

    if kind == "json_object":
        return {"grammar": Grammar.json_object()}
    schema = told.get("json_schema", {}).get("schema") if kind == "json_schema" and isinstance(
        told.get("json_schema"), dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequestError("body.response_format", told, 'of type "text", "json_object" or "json_schema", the '
                                                                'last with json_schema.schema')
    return {"grammar": Grammar.json_schema(schema)}


def _tools(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    tools = body.get("tools")
    if "tool_choice" in body and body["tool_choice"] not in ("auto", "none"):
        raise InvalidRequestError("body.tool_choice", body["tool_choice"], "auto or none here; serve the model, and "
                                                                           "use --server, for others")
    if tools is None or body.get("tool_choice") == "none":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequestError("body.tools", tools, "a list of objects")
    raise InvalidRequestError("body.tools", tools, "left out here; serve the model, and use --server, for tool calls")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(
            isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
        raise InvalidRequestError("body.messages", messages, "a list of objects with role and content, not empty")
    return [{**one, "content": _content(one.get("content"), i)} for i, one in enumerate(messages)]


def _content(content: Any, index: int) -> str:
    """A message's text; parts of it are joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" and
                                         isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise InvalidRequestError(f"body.messages[{index}].content", content, "a string, or a list of parts of type text")


def _prompts(body: Mapping[str, Any], name: str = "prompt") -> list[Any]:
    """Texts and lists of token ids, of one or of many."""
    given = body.get(name)
    many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    for one in many:
        tokens = isinstance(one, list) and one and all(isinstance(t, int) and not isinstance(t, bool) for t in one)
        if not tokens and not (isinstance(one, str) and (one or name == "prompt")):
            raise InvalidRequestError(f"body.{name}", given, "a string, token ids, or a list of either, none empty")
    return many


def _whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(f"body.{name}", value, f"a whole number from {low} to {high}")
    return value
