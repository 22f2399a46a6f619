"""What happened since the start, in Prometheus' text format (version 0.0.4). Counted on the event loop alone."""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.apps.model_host import ModelHost
    from edge_runtime.offload.hybrid_status import HybridStatus
    from edge_runtime.outcome import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TBT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts by upper bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        running = 0
        for bound, count in zip(self.bounds, self.counts):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f'{name}_bucket{{le="+Inf"}} {running + self.counts[-1]}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {running + self.counts[-1]}"


@dataclass
class Metrics:
    """requests: (path, status) -> count; a status of 499 is a client that went away. Times are seconds."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BUCKETS))
    tbt: Histogram = field(default_factory=lambda: Histogram(TBT_BUCKETS))
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS_BUCKETS))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def answered(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] = self.requests.get((path, status), 0) + 1
        self.seconds.observe(seconds)

    def note(self, stats: Stats) -> None:
        """A reply that ended."""
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.completion_tokens += stats.completion_tokens
        if stats.completion_tokens:
            self.ttft.observe(stats.ttft)

    def drawn(self, times: Sequence[float], before: float | None = None) -> float | None:
        """Tokens of one reply, drawn at `times`, behind one drawn at `before`; returns when the last of them was."""
        for now in times:
            if before is not None:
                self.tbt.observe(now - before)
            before = now
        return before

    def text(self, host: ModelHost, running: int) -> str:
        lines: list[str] = []

        def add(name: str, kind: str, what: str, *samples: str) -> None:
            lines.extend((f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples))

        def one(name: str, kind: str, what: str, value: float, labels: str = "") -> None:
            add(name, kind, what, f"{name}{labels} {value}")

        add("edge_requests_total", "counter", "HTTP requests answered, by path and status.",
            *(f'edge_requests_total{{path="{path}",status="{status}"}} {count}'
              for (path, status), count in sorted(self.requests.items())))
        for name, what, histogram in (
                ("edge_time_to_first_token_seconds", "From submission to first token.", self.ttft),
                ("edge_time_between_tokens_seconds", "From each token of a reply to its next.", self.tbt),
                ("edge_request_seconds", "HTTP requests from first to last byte.", self.seconds)):
            add(name, "histogram", what, *histogram.lines(name))
        one("edge_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens)
        one("edge_cached_prompt_tokens_total", "counter", "Of them, found computed already.", self.cached_tokens)
        one("edge_completion_tokens_total", "counter", "Tokens of replies.", self.completion_tokens)
        one("edge_http_requests_running", "gauge", "HTTP requests being answered.", running)
        llm = host.llm
        if llm is not None and host.current is not None:
            status = llm.status()
            label = f'{{model="{_escaped(host.current)}"}}'
            one("edge_model_info", "gauge", "The open model.", 1, label)
            one("edge_mode_info", "gauge", "Who attends where.", 1, f'{{mode="{_escaped(status.mode)}"}}')
            one("edge_kv_pages_used", "gauge", "KV pages in use, cached prefixes included.", status.pages_used)
            one("edge_kv_pages_cached", "gauge", "KV pages of the prefix cache.", status.pages_cached)
            one("edge_kv_pages_total", "gauge", "KV pages that the budget allows.", status.pages_total)
            one("edge_kv_page_bytes", "gauge", "Bytes of a KV page.", status.page_bytes)
            add("edge_kv_bytes", "gauge", "KV in each memory; of a hybrid device, the device's are copies.",
                f'edge_kv_bytes{{memory="host"}} {status.host_kv_bytes}',
                f'edge_kv_bytes{{memory="device"}} {status.device_kv_bytes}')
            add("edge_kv_budget_bytes", "gauge", "What KV may take of each memory.",
                f'edge_kv_budget_bytes{{memory="host"}} {status.host_kv_budget}',
                f'edge_kv_budget_bytes{{memory="device"}} {status.device_kv_budget}')
            if status.placement is not None:
                lines.extend(_placement(status.placement))
            one("edge_sequences_running", "gauge", "Sequences in the batch.", status.running)
            one("edge_queue_length", "gauge", "Sequences that wait for a place in the batch.", status.waiting)
            one("edge_steps_total", "counter", "Steps of the engine since the model was opened.", status.steps)
            one("edge_preemptions_total", "counter", "Sequences put off for want of pages.", status.preemptions)
        return "\n".join(lines) + "\n"


def _placement(status: HybridStatus) -> Iterator[str]:
    """Who attended, of a hybrid device."""
    name = "edge_laps_total"
    yield f"# HELP {name} Laps of the device through all layers, by mode."
    yield f"# TYPE {name} counter"
    for mode, count in status.modes.items():
        yield f'{name}{{mode="{_escaped(mode)}"}} {count}'
    for name, kind, what, value in (
            ("edge_devices_lost_total", "counter", "Devices that were lost while sequences ran.", status.lost),
            ("edge_device_memory_short_total", "counter", "Steps that found too little memory there.", status.short)):
        yield f"# HELP {name} {what}"
        yield f"# TYPE {name} {kind}"
        yield f"{name} {value}"
    if status.laps and status.error == status.error:  # NaN: nothing was predicted yet
        yield "# HELP edge_prediction_error_ratio Median of |predicted / measured - 1| of the latest laps."
        yield "# TYPE edge_prediction_error_ratio gauge"
        yield f"edge_prediction_error_ratio {status.error}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
