"""What a hybrid device does, for those who watch it."""
from __future__ import annotations

from dataclasses import dataclass, field

from edge_runtime.offload.choices import Mode


@dataclass(frozen=True)
class LapRecord:
    """One lap as it went. tokens: decoding rows that it finished. seconds of the lap; predicted: by the cost model.
    considered: mode -> tokens per second that the scheduler expected of it, for each that it could have taken."""

    mode: Mode
    rows: int
    on_device: int
    on_host: int
    tokens: int
    predicted: float
    seconds: float
    bound_by: str
    considered: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HybridStatus:
    """What is where. mode: of the last lap, None before the first. device_tokens: KV copies on the device;
    pool_tokens: what fits there. modes: laps by mode. error: median of |predicted / measured - 1|. device: what does
    the matrix work now, after a loss another one; lost: how many another one took over from. short: steps that found
    too little memory there. laps: the latest."""

    device: str
    mode: Mode | None
    device_tokens: int
    pool_tokens: int
    modes: dict[str, int]
    error: float
    lost: int
    short: int
    laps: tuple[LapRecord, ...]
