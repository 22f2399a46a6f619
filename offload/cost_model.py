"""What a step would take: curves of one layer, put together, and corrected by what steps really took."""
from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from edge_runtime.offload.curves import Curves, Grid, Line

__all__ = ["CostModel", "Curves"]

WEIGHT = 0.1  # of a new measurement in the running correction: the last 20 steps or so
EAGER = 4  # the first measurements of all count for more, 1/4, 1/5 ...: the profile was taken at another time
COMMON = 0.75  # of that, what counts for steps of every kind: a machine that slows down slows all of them ...
COMMON_BOUND = 1.25  # ... by so much at most: what is further off is taken for a fault of the curves of that kind
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
        self._common = 0.0  # logarithms of what predictions are multiplied with: of all kinds, and of each besides
        self._own: dict[str, float] = {}
        self._notes = 0
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
        """What predictions of a kind of step are to be multiplied with, 1 before anything was measured. A kind that was
        not measured yet has what is common to those that were: else it would look better than they do for no reason but
        that nobody tried it."""
        return min(max(math.exp(self._common + self._own.get(kind, 0.0)), 1 / BOUND), BOUND)

    def corrected(self, kind: str, seconds: float) -> float:
        return seconds * self.correction(kind)

    def note(self, kind: str, predicted: float, measured: float) -> None:
        """A step that `corrected` said would take `predicted` seconds took `measured`."""
        if not (predicted > 0 and measured > 0 and math.isfinite(predicted) and math.isfinite(measured)):
            return
        ratio = measured / predicted
        self._ratios.setdefault(kind, deque(maxlen=KEPT)).append(predicted / measured)
        off = max(WEIGHT, 1 / (EAGER + self._notes)) * math.log(min(max(ratio, 1 / STEP), STEP))
        self._notes += 1
        drift, limit = math.log(COMMON_BOUND), math.log(BOUND)
        common = min(max(self._common + COMMON * off, -drift), drift)
        own = self._own.get(kind, 0.0) + off - (common - self._common)
        self._common, self._own[kind] = common, min(max(own, -limit - common), limit - common)

    @property
    def error(self) -> float:
        """Median of |predicted / measured - 1| over the latest steps of all kinds; NaN before the first."""
        return self.error_of()

    def error_of(self, *kinds: str) -> float:
        """The same for some kinds of steps; all of them where none is named."""
        chosen = [ratios for kind, ratios in self._ratios.items() if kind in kinds or not kinds]
        off = [abs(ratio - 1) for ratios in chosen for ratio in ratios]
        return statistics.median(off) if off else math.nan
