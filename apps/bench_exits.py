"""Replies with and without early exit, in turns: tokens per second, layers per token, drafts that were right."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.early_exit import EarlyExit
from edge_runtime.errors import InvalidRequestError
from edge_runtime.llm import LLM
from edge_runtime.outcome import Reply
from edge_runtime.sampling import SamplingParams

REPORT = (
    "Outage report. At 09:40 on 12 March the booking system of the Harwick branch went down. A full disk on server "
    "HB-204 was the cause. Priya Novak moved the log files and the system was back at 11:15. 320 customers were "
    "affected. The team will add an alarm before 2 April.")


def bench_exits(path: Path, ways: Sequence[EarlyExit], texts: Sequence[str], *, tokens: int = 128, repeat: int = 3,
                threads: int | None = None, kv: str = "auto", exit_layers: Sequence[int] | None = None,
                say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Rows as of `bench.run_bench`, one for full replies and one for each way: greedy decoding of `texts`, one after
    another, medians of `repeat` rounds. More keys: layers_per_token, exits, acceptance, same_tokens (share of the
    tokens that are the full model's at the same place), x_full."""
    if not texts:
        raise InvalidRequestError("texts", texts, "at least one prompt to reply to")
    say("loading for replies with early exit")
    with LLM(path, threads=threads, kv=kv, exit_layers=exit_layers, max_batch=1) as llm:
        settings: list[EarlyExit | None] = [None, *ways]
        rates: list[list[float]] = [[] for _ in settings]
        replies: list[list[Reply]] = [[] for _ in settings]
        for round in range(repeat + 1):  # the first one compiles
            for at, early in enumerate(settings):
                say(f"round {round} of {repeat}: {_name(early)}")
                replies[at] = [_reply(llm, text, early, tokens) for text in texts]
                if round:
                    rates[at].append(_rate(replies[at]))
    full = statistics.median(rates[0])
    return [_row(_name(early), statistics.median(rates[at]), full, replies[at], replies[0], rates[at])
            for at, early in enumerate(settings)]


def _reply(llm: LLM, text: str, early: EarlyExit | None, tokens: int) -> Reply:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, early_exit=early or False)
    found: Reply = llm.generate(text, params)
    return found


def _rate(replies: Sequence[Reply]) -> float:
    """Tokens after each reply's first, per second of decoding."""
    tokens = sum(max(0, reply.stats.completion_tokens - 1) for reply in replies)
    return tokens / max(1e-9, sum(reply.stats.seconds - reply.stats.ttft for reply in replies))


def _row(name: str, rate: float, full_rate: float, replies: Sequence[Reply], full: Sequence[Reply],
         runs: Sequence[float]) -> dict[str, Any]:
    exits: dict[int, int] = {}
    for reply in replies:
        for layer, count in reply.stats.exits.items():
            exits[layer] = exits.get(layer, 0) + count
    left, drafted = sum(exits.values()), sum(reply.stats.drafted for reply in replies)
    same = sum(a == b for one, other in zip(replies, full) for a, b in zip(one.token_ids, other.token_ids))
    total = sum(max(len(one.token_ids), len(other.token_ids)) for one, other in zip(replies, full))
    layers = sum(layer * count for layer, count in exits.items()) / left if left else None
    row = {"name": name, "value": round(rate, 1), "llama_cpp": None, "ratio": None, "unit": "tokens/s",
           "x_full": round(rate / full_rate, 3), "same_tokens": round(same / max(1, total), 4), "exits": exits,
           "layers_per_token": None if layers is None else round(layers, 3),
           "acceptance": round(sum(r.stats.accepted for r in replies) / drafted, 4) if drafted else None,
           "runs": [round(run, 1) for run in runs]}
    if layers is not None:
        drafts = f", {row['acceptance']:.0%} of the drafts right" if drafted else ""
        row["detail"] = (f"{name}: x full {row['x_full']:.2f}, {layers:.2f} layers per token, "
                         f"{row['same_tokens']:.1%} of the tokens the full model's{drafts}")
    return row


def _name(early: EarlyExit | None) -> str:
    return "reply_full" if early is None else f"reply_{early.missing_kv}"
