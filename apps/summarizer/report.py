"""What a run did: counts while it runs, and a report at its end."""
from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.apps.summarizer.asks import Answer

SLOWEST = 5


@dataclass
class Totals:
    """Of this run alone, but for `kept`: documents that an earlier one had done. documents: ended in this run, failed
    ones included; requests: answered; reused: answers that the ledger had; retried: attempts that failed and were made
    again. Rates in tokens per second since the start."""

    documents: int = 0
    failed: int = 0
    kept: int = 0
    requests: int = 0
    reused: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def tick(self, tokens: int) -> None:
        """Tokens came: from any thread."""
        with self._lock:
            self.completion_tokens += tokens

    def answered(self, answer: Answer, ticked: int) -> None:
        """A request ended; `ticked` of its tokens were told of before."""
        with self._lock:
            self.requests += 1
            self.prompt_tokens += answer.prompt_tokens
            self.cached_tokens += answer.cached_tokens
            self.completion_tokens += answer.completion_tokens - ticked
            _add(self.extra, answer.extra)

    def ended_document(self, name: str, seconds: float, failed: bool) -> None:
        self.documents += 1
        self.failed += failed
        heapq.heappush(self.slowest, (seconds, name))
        if len(self.slowest) > SLOWEST:
            heapq.heappop(self.slowest)

    @property
    def done(self) -> int:
        return self.documents + self.kept

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def completion_rate(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds > 0 else 0.0


def closing_report(totals: Totals, noun: str = "documents") -> str:
    """Some lines for a reader: documents, tokens in and out, cache hits, what the engine told of early exits and modes,
    the slowest documents."""
    lines = [f"{totals.done - totals.failed} of {totals.done} {noun} in {totals.seconds:.1f} s: "
             f"{totals.prompt_tokens} tokens read ({totals.prompt_rate:.1f} tokens/s), {totals.completion_tokens} "
             f"written ({totals.completion_rate:.1f} tokens/s)"]
    if totals.kept or totals.reused:
        lines.append(f"from before: {totals.kept} {noun} and {totals.reused} answers were in the ledger already")
    if totals.prompt_tokens:
        lines.append(f"prefix cache: {totals.cached_tokens} of {totals.prompt_tokens} prompt tokens "
                     f"({totals.cached_tokens / totals.prompt_tokens:.0%}) in {totals.requests} requests")
    if totals.retried:
        lines.append(f"retried: {totals.retried} attempts")
    for name, value in sorted(totals.extra.items()):
        text = _histogram(value, "layer " if name == "exits" else "")
        if text:
            lines.append(f"{name.replace('_', ' ')}: {text}")
    if totals.documents > 1 and totals.slowest:
        slowest = ", ".join(f"{name} {seconds:.1f} s" for seconds, name in sorted(totals.slowest, reverse=True)[:3])
        lines.append(f"slowest: {slowest}")
    return "\n".join(lines)


def _add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Numbers are summed, words counted, mappings and lists summed part by part."""
    for name, value in more.items():
        if isinstance(value, bool | str):
            value = {str(value): 1}
        elif isinstance(value, list | tuple) and all(isinstance(part, int | float) for part in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found = total.setdefault(name, {})
            if isinstance(found, dict):
                _add(found, value)
        elif isinstance(value, int | float) and isinstance(total.get(name, 0), int | float):
            total[name] = total.get(name, 0) + value


def _histogram(value: Any, label: str) -> str:
    if isinstance(value, Mapping):
        parts = [(name, part) for name, part in value.items() if part and not isinstance(part, Mapping)]
        whole = sum(part for _, part in parts) or 1
        return ", ".join(f"{label}{name}: {part:g} ({part / whole:.0%})" for name, part in parts)
    return f"{value:g}" if value else ""
