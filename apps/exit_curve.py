"""Quality against speed of early exit: how often tokens are the full model's, and what that saves, per setting."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.early_exit import EarlyExit
from edge_runtime.errors import InvalidRequestError
from edge_runtime.exit_trace import ExitTrace

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """A way to leave early. kind: "full", "layer", "threshold", "calibrated" or "verify"; early: what a request says,
    None for the full model."""

    name: str
    kind: str
    early: EarlyExit | None = None


@dataclass(frozen=True)
class Point:
    """A setting's quality and speed. agreement: share of decoded tokens that are the full model's, given the same text
    before them. layers_per_token: mean layer at which tokens leave; leaving: layer -> share of tokens.

    Measured on whole replies, None where they were not made: tokens_per_second, of one reply at a time after its first
    token; speedup, over the full model's; same_replies, share that equal the full model's; facts_kept, of the key facts
    that the prompts' documents hold; acceptance, of drafts.
    """

    name: str
    kind: str
    criterion: str = ""
    thresholds: dict[int, float] = field(default_factory=dict)
    agreement: float = 1.0
    layers_per_token: float = 0.0
    leaving: dict[int, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    speedup: float | None = None
    same_replies: float | None = None
    facts_kept: float | None = None
    acceptance: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """A prompt's token ids, and the facts that a good reply holds (none: not known)."""

    prompt: Sequence[int]
    facts: tuple[str, ...] = ()


def settings(exits: Sequence[int], criteria: Sequence[str], missing_kv: str = "recompute",
             calibrated: Mapping[str, Mapping[int, float]] | None = None) -> list[Setting]:
    """The full model, drafts at the lowest exit, every exit alone, one threshold for all exits in each criterion, and
    calibrated thresholds by criterion."""
    EarlyExit(missing_kv).check(exits)
    if missing_kv == "verify":
        raise InvalidRequestError("missing_kv", missing_kv, "recompute or propagate: verify is measured beside them")
    found = [Setting("full model", "full"), Setting("verify", "verify", EarlyExit("verify"))]
    found += [Setting(f"layer {layer}", "layer", EarlyExit(missing_kv, "layer", layer=layer)) for layer in exits]
    for criterion in criteria:
        found += [Setting(f"{criterion} {limit:g}", "threshold", EarlyExit(missing_kv, criterion, dict.fromkeys(
            exits, limit))) for limit in THRESHOLDS]
        own = (calibrated or {}).get(criterion)
        if own:
            found.append(Setting(f"{criterion} calibrated", "calibrated", EarlyExit(missing_kv, criterion, own)))
    return found


def quality(trace: ExitTrace, setting: Setting) -> Point:
    """A setting's agreement and depth, from what the exits would have said."""
    early, exits = setting.early, trace.exits
    if early is None or early.drafts:
        return Point(setting.name, setting.kind, layers_per_token=float(trace.layers), leaving={trace.layers: 1.0})
    if early.criterion == "layer":
        left = np.full(trace.positions, exits.index(early.layer if early.layer is not None else exits[0]))
    else:
        left = trace.leaves(early.criterion, [(early.thresholds or {}).get(layer, math.inf) for layer in exits])
    differs = trace.differs(left)
    depth = trace.depth(trace.with_cap(left, early.max_pending) if early.missing_kv == "recompute" else left)
    levels, counts = np.unique(depth, return_counts=True)
    return Point(setting.name, setting.kind, early.criterion, dict(early.thresholds or {}),
                 agreement=float(1 - differs.mean()), layers_per_token=float(depth.mean()),
                 leaving={int(level): int(count) / trace.positions for level, count in zip(levels, counts)})


def speed(llm: LLM, points: Sequence[Point], chosen: Sequence[Setting], tasks: Sequence[Task], max_tokens: int = 256,
          rounds: int = ROUNDS, advance: Callable[[int, int], Any] | None = None) -> list[Point]:
    """The points with what whole replies measure, one reply at a time, settings in turns; medians of the rounds."""
    rates: list[list[float]] = [[] for _ in chosen]
    texts: list[list[str]] = [[] for _ in chosen]
    stats: list[list[Any]] = [[] for _ in chosen]
    reply = lambda task, setting, most: llm.generate(
        task.prompt, max_tokens=most, temperature=0.0, early_exit=False if setting.early is None else setting.early)
    for setting in chosen:  # the first of each compiles
        reply(tasks[0], setting, min(16, max_tokens))
    done = 0
    for number in range(rounds):
        for i, setting in enumerate(chosen):
            replies = [reply(task, setting, max_tokens) for task in tasks]
            if not number:
                texts[i], stats[i] = [reply.text for reply in replies], [reply.stats for reply in replies]
            tokens = sum(max(0, reply.stats.completion_tokens - 1) for reply in replies)
            seconds = sum(reply.stats.seconds - reply.stats.ttft for reply in replies)
            rates[i].append(tokens / seconds if seconds > 0 else 0.0)
            done += 1
            if advance is not None:
                advance(done, rounds * len(chosen))
    full = next((i for i, setting in enumerate(chosen) if setting.early is None), None)
    facts = sum(len(task.facts) for task in tasks)
    found = []
    for i, point in enumerate(points):
        kept = sum(fact.casefold() in text.casefold() for task, text in zip(tasks, texts[i]) for fact in task.facts)
        drafted, accepted = sum(s.drafted for s in stats[i]), sum(s.accepted for s in stats[i])
        ratios = [] if full is None else [a / b for a, b in zip(rates[i], rates[full]) if b > 0]
        found.append(replace(
            point, tokens_per_second=statistics.median(rates[i]), speedup=statistics.median(ratios) if ratios else None,
            same_replies=None if full is None else float(np.mean([a == b for a, b in zip(texts[i], texts[full])])),
            facts_kept=kept / facts if facts else None, acceptance=accepted / drafted if drafted else None))
    return found


def table(points: Sequence[Point]) -> str:
    """The numbers as aligned text."""
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [("setting", "agreement", "layers/token", "tokens/s", "x full", "same replies", "facts kept")]
    rows += [(p.name, f"{p.agreement:.2%}", f"{p.layers_per_token:.2f}", cell(p.tokens_per_second, ".0f"),
              cell(p.speedup, ".2f"), cell(p.same_replies, ".0%"), cell(p.facts_kept, ".1%")) for p in points]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{value:<{width}}" if not i else f"{value:>{width}}" for i, (value, width) in enumerate(
        zip(row, widths))) for row in rows)
