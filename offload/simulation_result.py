"""What a simulation found: throughput, latencies, and how busy both processors were."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from edge_runtime.offload.choices import Mode


class LapRecord(NamedTuple):
    """Seconds since the beginning, and rows: decoding ones on the device and on the host, those that waited, prompt
    tokens that came along; KV tokens on the device; seconds that each processor was busy; tokens that it gave."""

    start: float
    seconds: float
    mode: Mode
    on_device: int
    on_host: int
    waiting: int
    prompt: int
    kv_on_device: int
    device_busy: float
    host_busy: float
    tokens: int


class Measured(NamedTuple):
    """One request: when it came, its prompt, and when each of its tokens was there."""

    arrival: float
    prompt: int
    times: tuple[float, ...]


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Nearest rank; NaN where there is nothing."""
        ordered = sorted(values)
        if not ordered:
            return cls(math.nan, math.nan, math.nan)
        return cls(*(ordered[max(math.ceil(share * len(ordered)) - 1, 0)] for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class SimulationResult:
    """Seconds; throughput in generated tokens per second. requests: finished; refused: longer than what the policy
    can hold. batch: sequences that got a token in a lap, on average, weighed by time; on_device: of them. utilization:
    share of the time that each was busy. modes: share of the time. pool_tokens, pool_bytes: KV that the device
    holds."""

    policy: str
    seconds: float
    requests: int
    refused: int
    tokens: int
    throughput: float
    ttft: Percentiles
    tbt: Percentiles
    device_utilization: float
    host_utilization: float
    pool_tokens: int
    pool_bytes: int
    batch: float
    on_device: float
    modes: dict[str, float]
    laps: tuple[LapRecord, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, policy: str, pool_tokens: int, kv_bytes: int, laps: Sequence[LapRecord], done: Sequence[Measured],
           refused: int, device_busy: float, host_busy: float) -> SimulationResult:
        end = max((lap.start + lap.seconds for lap in laps), default=0.0)
        start = min((one.arrival for one in done), default=0.0)
        seconds, working = max(end - start, 0.0), sum(lap.seconds for lap in laps)
        tokens = sum(len(one.times) for one in done)
        modes: Counter[str] = Counter()
        for lap in laps:
            modes[lap.mode.value] += lap.seconds  # type: ignore[assignment]

        def mean(values: Sequence[float]) -> float:
            return sum(value * lap.seconds for value, lap in zip(values, laps)) / working if working else 0.0

        return cls(
            policy, seconds, len(done), refused, tokens, tokens / seconds if seconds else 0.0,
            Percentiles.of([one.times[0] - one.arrival for one in done]),
            Percentiles.of([after - before for one in done for before, after in zip(one.times, one.times[1:])]),
            device_busy / seconds if seconds else 0.0, host_busy / seconds if seconds else 0.0, pool_tokens,
            pool_tokens * kv_bytes, mean([lap.on_device + lap.on_host for lap in laps]),
            mean([lap.on_device for lap in laps]),
            {mode: spent / working for mode, spent in modes.most_common()} if working else {}, tuple(laps))

    def as_json(self) -> dict[str, Any]:
        """Without the laps. What is not a number (no token gap was seen) is null."""
        value = asdict(self)
        del value["laps"]
        return {name: _finite(one) for name, one in value.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
