"""Sequences to calibrate on, from texts: what the model replies to them, or the texts themselves."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.errors import InvalidRequestError, NotEnoughTextError
from edge_runtime.exit_trace import Advance, Decoded

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

MOST_CONTEXT = 8192  # tokens of text that are asked for at most, however long the model's context is
TEXT_LEAD = 16  # tokens of a text that are its prompt when the text itself is replayed
AT_ONCE = 256  # prompts in one batch: enough to keep the engine full, and progress to be seen
PLACE = "{document}"


def passages(llm: LLM, texts: Sequence[str], tokens: int) -> list[tuple[int, str]]:
    """(number of its text, passage): texts as they are, or cut where they are longer than `tokens`.

    Raises NotEnoughTextError where all together are shorter than one context of the model.
    """
    if tokens < 2 * TEXT_LEAD:
        raise InvalidRequestError("passage_tokens", tokens, f"a whole number from {2 * TEXT_LEAD} up")
    found, total = [], 0
    for number, text in enumerate(texts):
        ids = llm.tokenize(text, add_special=False)
        total += len(ids)
        if len(ids) <= tokens:
            if ids:
                found.append((number, text))
            continue
        for start in range(0, len(ids), tokens):
            if len(ids) - start >= TEXT_LEAD or not start:
                found.append((number, llm.detokenize(ids[start:start + tokens])))
    need = min(llm.context, MOST_CONTEXT)
    if total < need:
        raise NotEnoughTextError("tokens", total, need, "one context of the model holds")
    return found


def replies(llm: LLM, passages: Sequence[tuple[int, str]], *, prompt: str = PLACE, raw: bool = False,
            max_tokens: int = 256, advance: Advance | None = None) -> list[Decoded]:
    """The full model's greedy replies to passages: what is decoded later, so what exits should be judged on.

    prompt: with {document} where the passage belongs. raw: continued as it is, not as a chat's message. Replies
    without a decoded token are left out.
    """
    if PLACE not in prompt:
        raise InvalidRequestError("prompt", prompt, f"a text with {PLACE} in it")
    asked = [prompt.replace(PLACE, text) for _, text in passages]
    all_ids = [llm._prompt_ids(text) if raw else llm._chat_ids(text) for text in asked]
    found = []
    for start in range(0, len(all_ids), AT_ONCE):
        part = all_ids[start:start + AT_ONCE]
        for (number, _), ids, reply in zip(passages[start:], part, llm.generate(
                [ids.tolist() for ids in part], max_tokens=max_tokens, temperature=0.0, early_exit=False)):
            if reply.error is not None:
                raise reply.error
            # A reply that ended by itself was decoded to its end token; one cut short, to its last but one.
            rows = reply.token_ids if reply.finish_reason == "stop" else reply.token_ids[:-1]
            if rows:
                found.append(Decoded(ids, np.asarray(rows, np.int32), number))
        if advance is not None:
            advance(min(start + AT_ONCE, len(all_ids)), len(all_ids))
    return found


def as_written(llm: LLM, passages: Iterable[tuple[int, str]]) -> list[Decoded]:
    """The passages' own tokens, after the first few of each."""
    found = []
    for number, text in passages:
        ids = np.asarray(llm.tokenize(text), np.int32)
        if len(ids) > TEXT_LEAD:
            found.append(Decoded(ids[:TEXT_LEAD], ids[TEXT_LEAD:], number))
    return found
