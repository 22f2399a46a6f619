"""From a validated body to SamplingParams: OpenAI's names and defaults, and ours beside them."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge_runtime.apps.server.errors import ApiError
from edge_runtime.sampling import SamplingParams
from edge_runtime.structured import Grammar

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

Body = Mapping[str, Any]
_SAME = ("temperature", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty",
         "ignore_eos", "stop_token_ids", "early_exit")
SMALLEST_TOP_P = 1e-6  # OpenAI's API takes 0 for "only the likeliest"


@dataclass(frozen=True)
class Asked:
    """What every kind of completion is asked alike."""

    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    priority: str


def asked(body: Body, *, max_tokens: int | None, logprobs: int | None, grammar: Grammar | None = None) -> Asked:
    """Raises ApiError, and InvalidRequestError for values that only SamplingParams can judge."""
    values: dict[str, Any] = {name: body[name] for name in _SAME if body.get(name) is not None}
    if body.get("top_p") is not None:
        values["top_p"] = max(float(body["top_p"]), SMALLEST_TOP_P)
    if body.get("stop") is not None:
        values["stop"] = body["stop"]
    if body.get("logit_bias"):
        values["logit_bias"] = _biases(body["logit_bias"])
    options = body.get("stream_options") or {}
    if options and not body.get("stream"):
        raise ApiError(400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                       param="stream_options", code="invalid_value")
    params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, grammar=grammar, **values)
    return Asked(params, body.get("n") or 1, bool(body.get("stream")), bool(options.get("include_usage")),
                 body.get("priority") or "interactive")


def reply_params(params: SamplingParams, index: int) -> SamplingParams:
    """Those of reply `index` of n: a seed of its own, the first keeps the one that was asked for."""
    return params if index == 0 or params.seed is None else replace(params, seed=params.seed + index)


def grammar_of(form: Mapping[str, Any] | None) -> Grammar | None:
    """Of a `response_format`, or of `text.format` in /v1/responses, whose schema is not nested."""
    kind = (form or {}).get("type", "text")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_object()
    if kind == "json_schema":
        inner = form.get("json_schema", form)
        return Grammar.json_schema(inner["schema"], lenient=inner.get("strict") is False)
    return Grammar(kind, form[kind])


def check_placement(body: Body, llm: LLM) -> None:
    """Refuse a home for the KV that the open model does not have."""
    wanted, home = body.get("placement"), llm.status().kv_home
    if wanted not in (None, "auto", home):
        raise ApiError(400, f"placement={wanted!r}: the KV of this model lives on the {home}. Use 'auto' or {home!r}.",
                       param="placement", code="invalid_value")


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    out = {}
    for key, value in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ApiError(400, f"Invalid key in 'logit_bias': {key!r:.60}. Keys are token ids.", param="logit_bias",
                           code="invalid_value")
        out[int(key)] = float(value) if value > -100 else -math.inf  # OpenAI's API: -100 bans a token
    return out
