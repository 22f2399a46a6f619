"""How long an accelerator takes for the parts of a layer. Everything here runs on the accelerator's thread."""
from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from statistics import median
from typing import Any

import numpy as np

from edge_runtime.devices.accelerator import Accelerator, AttendPart
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.models.config import ModelConfig

FILL_TOKENS = 256  # of KV in one write
FILLED_BYTES = 256 << 20  # of KV: as many layers as this holds are filled, and measured; writing all takes too long
FILLED_LAYERS = 3  # at least
PASSES = 3  # over the layers at most, where they take little time
OWN_WORK = 0.1  # of a call's time spent by the thread: one that waits for another processor has spent less
FINE_CLOCK = 1e-5  # seconds
CALL_SECONDS = 0.6  # of one measurement at most, unless three calls take longer: medians gain little beyond

Clock = Callable[[], float]


class DeviceMeter:
    """Medians over layers and repeats. Layers take turns as in a lap, so that weights and KV come from where they come
    from then; the first call of a shape is not counted. On an asynchronous device a chain of calls is timed, and the
    wait at its end taken off."""

    def __init__(self, accelerator: Accelerator, config: ModelConfig, seed: int = 0):
        self.accelerator, self.config = accelerator, config
        self._rng = np.random.default_rng(seed)
        # Segment 0 is a smaller one: nothing precedes its queries. The rest of its layer is in the head.
        self.body = range(1, accelerator.layers) if accelerator.layers > 1 else range(1)
        self.filled = self.body
        self._asynchronous = accelerator.capabilities.asynchronous
        ready = accelerator.upload(self._noise(1, config.width))
        self._wait(ready)
        self._wait_seconds = median(_seconds(lambda: self._wait(ready)) for _ in range(5))

    def linear(self, rows: int, seconds: float) -> float:
        """One segment, measured for about `seconds`."""
        return self._median(self._segment(rows), seconds)

    def head(self, rows: int, seconds: float) -> float:
        """What a lap takes besides its attention and as many full segments as it has layers: embedding, segment 0 and
        the head, which holds the last layer's rest, less one segment."""
        a, ids, every = self.accelerator, np.zeros(rows, np.int64), np.arange(rows)
        attended = a.upload(self._noise(rows, self.config.q_width))

        def ends() -> None:
            x, _ = a.segment(0, a.embed(ids), None, every)
            a.head(x, attended, every, every)

        segment = self._segment(rows)
        self._wait(segment(self.body[0]))
        ends()
        found: list[float] = []
        until = time.perf_counter() + min(seconds, CALL_SECONDS)
        while not found or (len(found) < 4 * PASSES and time.perf_counter() < until):
            found.append(_seconds(ends) - median(self._samples(segment, 0.0)))
        return max(median(found), 0.0)

    def open(self, tokens: int, count: int, seconds: float) -> tuple[list[Any], int]:
        """The sequences that are measured next: `count` with KV of `tokens` tokens each, or of as many, at least 64, as
        `seconds` suffice to write; none where the device's budget does not hold them."""
        kv, opened = self.accelerator.kv, []
        try:
            if not kv.can_open(tokens, count):
                return [], 0
            for _ in range(count):
                opened.append(kv.open(tokens))
            self.filled = self.body[:max(FILLED_LAYERS, FILLED_BYTES // (count * tokens * self.config.kv_width * 8))]
            until, filled = time.perf_counter() + seconds, 0
            while filled < tokens and (filled < 64 or time.perf_counter() < until):
                piece = min(self._kv.shape[3], tokens - filled)
                for sequence in opened:
                    kv.write(sequence, filled, self._kv[:len(self.filled), :, :, :piece], self.filled)
                filled += piece
            return opened, filled
        except (OutOfMemoryError, ValueError):  # ValueError: longer than the device's longest sequence
            self.close(opened)
            return [], 0

    @cached_property
    def _kv(self) -> np.ndarray:
        """Tokens that sequences are filled with, again and again."""
        c = self.config
        return self._rng.standard_normal((len(self.body), 2, c.kv_heads, FILL_TOKENS, c.head_size), np.float32)

    def close(self, sequences: Sequence[Any]) -> None:
        for sequence in sequences:
            self.accelerator.kv.close(sequence)

    def attention(self, sequences: Sequence[Any], tokens: int, seconds: float) -> float:
        """One layer of a decoding row of each sequence, over `tokens` tokens, its own included."""
        return self._attention([(sequence, 1) for sequence in sequences], tokens - 1, seconds)

    def prompt(self, sequence: Any, rows: int, before: int, seconds: float) -> float:
        """One layer of `rows` rows of a prompt behind `before` tokens."""
        return self._attention([(sequence, rows)], before, seconds)

    def upload(self, nbytes: int, seconds: float) -> float:
        array = self._noise(max(1, nbytes // (4 * self.config.width)), self.config.width)
        return self._median(lambda layer: self.accelerator.upload(array), seconds, chain=1)

    def download(self, nbytes: int, seconds: float) -> float:
        there = self.accelerator.upload(self._noise(max(1, nbytes // (4 * self.config.width)), self.config.width))
        self._wait(there)
        found: list[float] = []
        until = time.perf_counter() + min(seconds, CALL_SECONDS)
        while len(found) < 3 or (len(found) < 16 and time.perf_counter() < until):
            found.append(_seconds(lambda: self.accelerator.download(there)))
        return median(found)

    def layers(self, sequences: Sequence[Any], tokens: int, seconds: float) -> list[float]:
        """Segment and attention of one layer after another, a row of each sequence, all times. Where the thread does
        the work itself, in its own processor time: that grows with waiting for memory, not with other programs' turns.
        """
        a = self.accelerator
        for sequence in sequences:
            sequence.length = tokens - 1
        parts = [AttendPart(sequence) for sequence in sequences]
        segment, qkv = self._segment(len(sequences)), self._qkv(len(sequences))

        def both(layer: int) -> Any:
            segment(layer)
            return a.attend(layer, qkv, parts)

        self._wait(both(self.body[0]))
        clock: Clock = time.perf_counter
        if not self._asynchronous and time.get_clock_info("thread_time").resolution <= FINE_CLOCK:
            began, worked = time.perf_counter(), time.thread_time()
            both(self.body[0])
            if time.thread_time() - worked > OWN_WORK * (time.perf_counter() - began):
                clock = time.thread_time
        return self._samples(both, seconds, passes=1000, layers=self.filled, clock=clock)

    def _attention(self, rows: Sequence[tuple[Any, int]], before: int, seconds: float) -> float:
        for sequence, _ in rows:
            sequence.length = before
        parts = [AttendPart(sequence, count) for sequence, count in rows]
        count = sum(part.count for part in parts)
        qkv, segment = self._qkv(count), self._segment(count)
        return self._median(lambda layer: self.accelerator.attend(layer, qkv, parts), seconds, before=segment,
                            layers=self.filled)

    def _segment(self, rows: int) -> Callable[[int], Any]:
        a, positions = self.accelerator, np.arange(rows)
        x, attended = a.upload(self._noise(rows, a.width)), a.upload(self._noise(rows, self.config.q_width))
        return lambda layer: a.segment(layer, x, attended if layer else None, positions)[1]

    def _qkv(self, rows: int) -> Any:
        return self.accelerator.upload(self._noise(rows, self.config.q_width + 2 * self.config.kv_width))

    def _noise(self, rows: int, width: int) -> np.ndarray:
        return self._rng.standard_normal((rows, width), np.float32)

    def _median(self, call: Callable[[int], Any], seconds: float, *, before: Callable[[int], Any] | None = None,
                layers: range | None = None, chain: int | None = None) -> float:
        """Of call(layer), layers in turns. before: what comes ahead of it in a lap, not counted, so that caches hold
        what they hold then."""
        for first in (before, call):
            if first is not None:
                self._wait(first(self.body[0]))
        return median(self._samples(call, seconds, before, layers=layers, chain=chain))

    def _samples(self, call: Callable[[int], Any], seconds: float, before: Callable[[int], Any] | None = None,
                 passes: int = PASSES, layers: range | None = None, chain: int | None = None,
                 clock: Clock = time.perf_counter) -> list[float]:
        layers = layers or self.body
        turns, seconds = itertools.cycle(layers), min(seconds, CALL_SECONDS)
        found: list[float] = []
        until = time.perf_counter() + seconds
        if self._asynchronous:
            most = chain or len(layers)
            count = max(1, min(most, int(seconds / max(self._chain(call, turns, 1), 1e-6))))
            while not found or (len(found) < passes * len(layers) / most and time.perf_counter() < until):
                found.append(self._chain(call, turns, count))
            return found
        while len(found) < 3 or (len(found) < passes * len(layers) and time.perf_counter() < until):
            layer = next(turns)
            if before is not None:
                before(layer)
            found.append(_seconds(partial(call, layer), clock))
        return found

    def _chain(self, call: Callable[[int], Any], turns: Iterator[int], count: int) -> float:
        """Seconds of one of `count` calls, of which the last is waited for."""
        began, last = time.perf_counter(), None
        for _ in range(count):
            last = call(next(turns))
        self._wait(last)
        return max(0.0, time.perf_counter() - began - self._wait_seconds) / count

    def _wait(self, array: Any) -> None:
        if self._asynchronous:
            self.accelerator.download(self.accelerator.take(array, 0, 1))


def _seconds(call: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    began = clock()
    call()
    return clock() - began
