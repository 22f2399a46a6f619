"""What a step would take: curves of one layer, put together, and corrected by what steps really took."""
from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from edge_runtime.offload.curves import Curves, Grid, Line

__all__ = ["CostModel", "Curves"]

WEIGHT = 0.1  # of a new measurement in the running correction: the last 20 steps or so
STEP = 2.0  # most that one measurement counts for: a page fault or a compilation is no trend
BOUND = 4.0  # of the correction: what is further off needs a new profile, not a factor
KEPT = 256  # measurements that `error` looks back on


class CostModel:
    """Predictions in seconds from `curves`, each for one layer unless said otherwise.

    Costs are never negative, 0 for no rows, and go on in straight lines beyond what was measured. Rows may be
    fractional: the mean of a batch that differs from layer to layer.
    """

    def __init__(self, curves: Curves):
        self.curves = curves
        self.layers, self.handover = curves.layers, curves.handover
        self._linear, self._head = (Line(points, through_zero=True) for points in (curves.linear, curves.head))
        self._upload, self._download = Line(curves.upload), Line(curves.download)
        self._bring = Line(curves.bring) if curves.bring else None
        self._device, self._host = Grid(curves.device_attention), Grid(curves.host_attention)
        self._device_prompt, self._host_prompt = Grid(curves.device_prompt), Grid(curves.host_prompt)
        self._factors: dict[str, float] = {}
        self._ratios: dict[str, deque[float]] = {}

    def linear(self, rows: float) -> float:
        """One segment."""
        return self._linear(rows) if rows > 0 else 0.0

    def head(self, rows: float) -> float:
        """Embedding, final norm and head: once a lap."""
        return self._head(rows) if rows > 0 else 0.0

    def device_attention(self, tokens: Sequence[float]) -> float:
        """Decoding rows that attend on the device over these many KV tokens each."""
        return self._device(len(tokens), sum(tokens) / len(tokens)) if tokens else 0.0

    def host_attention(self, tokens: Sequence[float]) -> float:
        """The same on the host, their KV written."""
        return self._host(len(tokens), sum(tokens) / len(tokens)) if tokens else 0.0

    def device_attention_of(self, rows: float, tokens: float) -> float:
        """`rows` rows (fractional, too) of `tokens` KV tokens each."""
        return self._device(rows, tokens)

    def host_attention_of(self, rows: float, tokens: float) -> float:
        return self._host(rows, tokens)

    def device_prompt(self, rows: float, before: float) -> float:
        """`rows` tokens of one prompt, which follow `before` tokens."""
        return self._device_prompt(rows, before)

    def host_prompt(self, rows: float, before: float) -> float:
        return self._host_prompt(rows, before)

    def upload(self, nbytes: float) -> float:
        return self._upload(nbytes) if nbytes > 0 else 0.0

    def download(self, nbytes: float) -> float:
        return self._download(nbytes) if nbytes > 0 else 0.0

    def bring(self, tokens: float) -> float:
        """KV of `tokens` tokens from the host's pages to the device."""
        if tokens <= 0:
            return 0.0
        if self._bring is None:
            return self.upload(tokens * self.curves.kv_bytes_device / self.layers)
        return self._bring(tokens)

    def crossing(self, rows: float) -> float:
        """Queries, keys and values of `rows` rows to the host and what they attended back: one layer."""
        if rows <= 0:
            return 0.0
        return self.download(rows * self.curves.q_bytes) + self.upload(rows * self.curves.o_bytes) + self.handover

    def together(self, device: float, host: float) -> tuple[float, float]:
        """When each ends, of `device` and `host` seconds of work (as measured alone) that begin at the same time: while
        both work each is slower, then the longer one goes on alone."""
        by_device, by_host = device * self.curves.contention_device, host * self.curves.contention_host
        if by_device <= by_host:
            return by_device, by_device + host - by_device / self.curves.contention_host
        return by_host + device - by_host / self.curves.contention_device, by_host

    def overlapped(self, device: float, host: float) -> float:
        """When both of them have ended."""
        return max(self.together(device, host))

    def correction(self, kind: str) -> float:
        """What predictions of a kind of step are to be multiplied with, 1 before anything was measured."""
        return self._factors.get(kind, 1.0)

    def corrected(self, kind: str, seconds: float) -> float:
        return seconds * self.correction(kind)

    def note(self, kind: str, predicted: float, measured: float) -> None:
        """A step that `corrected` said would take `predicted` seconds took `measured`."""
        if not (predicted > 0 and measured > 0 and math.isfinite(predicted) and math.isfinite(measured)):
            return
        ratio = measured / predicted
        self._ratios.setdefault(kind, deque(maxlen=KEPT)).append(predicted / measured)
        factor = self.correction(kind) * min(max(ratio, 1 / STEP), STEP) ** WEIGHT
        self._factors[kind] = min(max(factor, 1 / BOUND), BOUND)

    @property
    def error(self) -> float:
        """Median of |predicted / measured - 1| over the latest steps of all kinds; NaN before the first."""
        return self.error_of()

    def error_of(self, *kinds: str) -> float:
        """The same for some kinds of steps; all of them where none is named."""
        chosen = [ratios for kind, ratios in self._ratios.items() if kind in kinds or not kinds]
        off = [abs(ratio - 1) for ratios in chosen for ratio in ratios]
        return statistics.median(off) if off else math.nan
