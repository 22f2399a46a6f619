"""Arguments that LLM and its async twins share: one prompt or many, parameters for each, priorities."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edge_runtime.errors import EdgeRuntimeError, EngineStoppedError, InvalidRequestError
from edge_runtime.outcome import Reply
from edge_runtime.request import Request
from edge_runtime.sampling import SamplingParams
from edge_runtime.sequence import Priority

POOLINGS = ("mean", "last")


def failed_reply(request: Request, outcome: Any) -> Reply:
    """A reply among many: one that failed keeps its place. A stopped engine is everybody's failure and is raised."""
    if isinstance(outcome, EngineStoppedError) or (
            isinstance(outcome, BaseException) and not isinstance(outcome, EdgeRuntimeError)):
        raise outcome
    return request.reply("error", outcome) if isinstance(outcome, EdgeRuntimeError) else outcome


def is_list_of_prompts(prompts: Any) -> bool:
    if isinstance(prompts, str | np.ndarray):
        return False
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError("prompts", prompts, "a string, a list of token ids, or a list of such prompts")
    return not prompts or not isinstance(prompts[0], int | np.integer)


def one_each(params: Any, count: int, overrides: Mapping[str, Any]) -> list[SamplingParams]:
    if isinstance(params, Sequence) and not isinstance(params, str):
        if len(params) != count:
            raise InvalidRequestError("params", f"{len(params)} of them", f"one, or as many as prompts ({count})")
        return [SamplingParams.of(one, overrides) for one in params]
    return [SamplingParams.of(params, overrides)] * max(1, count)


def priority_of(value: Priority | str | None, default: Priority) -> Priority:
    if value is None:
        return default
    try:
        return value if isinstance(value, Priority) else Priority[str(value).upper()]
    except KeyError:
        raise InvalidRequestError("priority", value, "interactive or batch") from None


def processors(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise InvalidRequestError(name, value, "a list of numbers of processors, empty for all")
    return tuple(value)


def stack(vectors: Mapping[int, np.ndarray], single: bool, normalize: bool) -> np.ndarray:
    out = np.stack([vectors[i] for i in range(len(vectors))]) if vectors else np.zeros((0, 0), np.float32)
    if normalize and len(out):
        out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), np.float32(1e-12))
    return out[0] if single else out


def checked_variables(template: Any) -> dict[str, Any]:
    """What a caller adds to a chat template's variables."""
    if template is None:
        return {}
    if not isinstance(template, Mapping) or not all(isinstance(name, str) for name in template):
        raise InvalidRequestError("template", template, "a mapping from names to values, or None")
    for name in ("messages", "tools", "self"):
        if name in template:
            raise InvalidRequestError("template", name, "other names than messages and tools, which have arguments of "
                                                        "their own, and self")
    return dict(template)


def begins_text(template: Mapping[str, Any] | None) -> bool:
    """Whether a chat's reply begins a text, rather than going on with the last message."""
    return not (template or {}).get("continue_final_message")
