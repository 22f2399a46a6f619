"""When each processor worked: how long both did at once, and how long they could have."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

Interval = tuple[float, float]


class OverlapMeter:
    """Keeps intervals (seconds of time.perf_counter) from `start` until `stop`; before that it costs nothing."""

    def __init__(self) -> None:
        self.on = False
        self._device: list[Interval] = []
        self._host: list[Interval] = []

    def start(self) -> None:
        self.on = True
        self._device.clear()
        self._host.clear()

    def stop(self) -> OverlapTimes:
        self.on = False
        return OverlapTimes(total(self._device), total(self._host), both(self._device, self._host))

    @contextmanager
    def device(self) -> Iterator[None]:
        if not self.on:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._device.append((began, time.perf_counter()))

    def host(self, began: float, ended: float) -> None:
        if self.on:
            self._host.append((began, ended))


class OverlapTimes(NamedTuple):
    """Seconds that each worked, and that both did at once."""

    device: float
    host: float
    both: float

    @property
    def share(self) -> float:
        """Time that both were busy, of the most that could be: the lesser of their times."""
        most = min(self.device, self.host)
        return self.both / most if most > 0 else 0.0


def total(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in _united(intervals))


def both(one: list[Interval], two: list[Interval]) -> float:
    """Seconds covered by both lists."""
    a, b, i, j, seconds = _united(one), _united(two), 0, 0, 0.0
    while i < len(a) and j < len(b):
        seconds += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return seconds


def _united(intervals: list[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found
