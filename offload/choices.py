"""What the scheduler is asked, and what it answers: rows that want their next token, and the lap that gives it."""
from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

SPLIT_GRAIN = 64  # tokens: the device's share of a split sequence ends where a page of the host's ends


class Mode(str, Enum):
    """How host and device share a lap (one pass of the device through all layers); docs/scheduler.md draws them."""

    DEVICE_ONLY = "device-only"
    SYNCHRONOUS = "synchronous"
    PIPELINED = "pipelined"
    OVERLAP = "overlap"
    STREAMING = "streaming"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Row:
    """One decoding sequence that wants its next token.

    tokens: KV tokens that it attends over, its own new one included. device_tokens: leading tokens whose KV the device
    holds now (0: none). interactive: somebody waits for this token. flying: the layer at which it waits in a cohort of
    an overlap lap, -1 where it is not under way.
    """

    key: int
    tokens: int
    device_tokens: int = 0
    interactive: bool = False
    flying: int = -1

    @property
    def ready(self) -> bool:
        """The device holds all of it but the token that this lap computes."""
        return self.device_tokens >= self.tokens - 1


@dataclass(frozen=True)
class Estimate:
    """What a mode would give: seconds of a lap, tokens that it yields, and the part of the machine that bounds it:
    "weights" (the linear segments), "device attention", "host attention" or "transfer"."""

    seconds: float
    tokens: float
    bound_by: str

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """One lap. Every key of the rows asked about stands in exactly one of `device`, `host`, `split` and `waiting`.

    device: keys that attend on the device. host: keys that attend on the host; of an overlap lap, those that fly and
    those that start a cohort now. split: key -> leading tokens that the device attends over (a multiple of 64); the
    host attends over the rest. first: of a pipelined lap, the host's keys in sub-batch A, with the device's. waiting:
    keys that do not run in this lap; one that is flying keeps its place. bring: keys whose KV should come to the
    device, in the order of benefit; wanted: key -> leading tokens that the device should hold in the end. evict: keys
    whose device copy should go. predicted: seconds; tokens: what the lap yields, a fraction where host rows advance by
    layers. landing: cohorts of earlier overlap laps come to their end in this one, so that its time says nothing of
    its mode. considered: mode -> tokens per second once KV is where the mode wants it.
    """

    mode: Mode
    device: tuple[int, ...] = ()
    host: tuple[int, ...] = ()
    split: dict[int, int] = field(default_factory=dict)
    first: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    bring: tuple[int, ...] = ()
    evict: tuple[int, ...] = ()
    wanted: dict[int, int] = field(default_factory=dict)
    predicted: float = 0.0
    tokens: float = 0.0
    bound_by: str = ""
    landing: bool = False
    considered: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What predictions of such laps are corrected by: the mode, or "split"."""
        return "split" if self.split else self.mode.value
