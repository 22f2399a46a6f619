"""Replies with and without early exit, in turns: through the whole API, and by the device's calls alone."""
from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.devices.base import Draft, SequenceSlice, Step
from edge_runtime.early_exit import EarlyExit
from edge_runtime.llm import LLM
from edge_runtime.offload.pages import PagePool, pages_for
from edge_runtime.outcome import Reply
from edge_runtime.sampling import SamplingParams

FULL = "full"


@dataclass(frozen=True)
class Timed:
    """rates: decoded tokens per second of each round, without the first token of each reply. replies: of the last
    round, in the prompts' order."""

    rates: list[float]
    replies: list[Reply]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def layers_per_token(self) -> float:
        """Over all tokens of the replies; 0 without early exit."""
        counts = [(layer, count) for reply in self.replies for layer, count in reply.stats.exits.items()]
        tokens = sum(count for _, count in counts)
        return sum(layer * count for layer, count in counts) / tokens if tokens else 0.0

    @property
    def acceptance(self) -> float:
        drafted = sum(reply.stats.drafted for reply in self.replies)
        return sum(reply.stats.accepted for reply in self.replies) / drafted if drafted else 0.0


def in_turns(llm: LLM, prompts: Sequence[Sequence[int]], ways: Mapping[str, EarlyExit | None], tokens: int,
             rounds: int, ignore_eos: bool = False) -> dict[str, Timed]:
    """Greedy replies, one at a time, every way in every round; the first round compiles and is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    replies: dict[str, list[Reply]] = {}
    for number in range(rounds + 1):
        for name, early in ways.items():
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=ignore_eos,
                                    early_exit=early or False)
            replies[name] = [llm.generate(prompt, params) for prompt in (prompts if number else prompts[:2])]
            seconds = sum(reply.stats.seconds - reply.stats.ttft for reply in replies[name])
            if number:
                drawn = sum(max(0, reply.stats.completion_tokens - 1) for reply in replies[name])
                rates[name].append(drawn / max(seconds, 1e-9))
    return {name: Timed(rates[name], replies[name]) for name in ways}


def ratio(found: Mapping[str, Timed], name: str) -> float:
    """Of a way over full replies, the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(found[name].rates, found[FULL].rates))


def same_tokens(found: Mapping[str, Timed], name: str) -> bool:
    return all(a.token_ids == b.token_ids for a, b in zip(found[name].replies, found[FULL].replies))


def device_ratio(llm: LLM, prompt: Sequence[int], layer: int, tokens: int, rounds: int,
                 lengths: Sequence[int] = (2, 4, 6, 8)) -> tuple[float, int, bool]:
    """(ratio, draft length, whether the tokens are the same) of drafting at `layer` over one-row steps, by calls of the
    device alone, with the length that does best: what the engine around it may reach."""
    best = (0.0, 0, True)
    for most in lengths:
        ratios, same = [], True
        for number in range(rounds + 1):
            full, full_seconds = llm.engine.call(lambda: _steps(llm, prompt, tokens))
            drafted, seconds = llm.engine.call(lambda most=most: _drafts(llm, prompt, tokens, layer, most))
            same &= drafted[:tokens] == full[:tokens]
            if number:
                ratios.append(len(drafted) / seconds / (len(full) / full_seconds))
        best = max(best, (statistics.median(ratios), most, same))
    return best


def _start(llm: LLM, prompt: Sequence[int], tokens: int) -> tuple[np.ndarray, int, PagePool]:
    """Pages with the prompt's KV, and the first token."""
    device = llm._loaded.device
    count = pages_for(len(prompt) + tokens + 32)
    pool = PagePool(device.kv_layout, count * device.kv_layout.page_bytes)
    pages = pool.addresses(pool.alloc_many(count))
    ids = np.asarray(prompt, np.int32)
    for at in range(0, len(ids), device.max_rows):
        result = device.run(Step((SequenceSlice(ids[at:at + device.max_rows], at, pages, prompt=True),)))
    return pages, int(result.logits[0].argmax()), pool


def _steps(llm: LLM, prompt: Sequence[int], tokens: int) -> tuple[list[int], float]:
    device = llm._loaded.device
    pages, token, _pool = _start(llm, prompt, tokens)
    drawn: list[int] = []
    began = time.perf_counter()
    for position in range(len(prompt), len(prompt) + tokens):
        result = device.run(Step((SequenceSlice(np.array([token], np.int32), position, pages),)))
        token = int(result.logits[0].argmax())
        drawn.append(token)
    return drawn, time.perf_counter() - began


def _drafts(llm: LLM, prompt: Sequence[int], tokens: int, layer: int, most: int) -> tuple[list[int], float]:
    device = llm._loaded.device
    pages, token, _pool = _start(llm, prompt, tokens)
    drawn: list[int] = []
    began = time.perf_counter()
    while len(drawn) < tokens:
        (found,) = device.speculate(layer, (Draft(token, len(prompt) + len(drawn), pages, most),))
        for i, row in enumerate(found.logits):
            token = int(row.argmax())
            drawn.append(token)
            if i == len(found.tokens) or token != found.tokens[i]:
                break
    return drawn, time.perf_counter() - began
