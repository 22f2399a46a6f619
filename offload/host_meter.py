"""How long the host takes for its half of a layer, over pages of its own."""
from __future__ import annotations

import ctypes
import itertools
import math
import time
from statistics import median

import numpy as np

from edge_runtime.devices.base import PAGE_TOKENS, KVLayout
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.host_attention import Attended, HostAttention
from edge_runtime.offload.host_rows import HostRows, HostSlice
from edge_runtime.offload.pages import PagePool, pages_for

LEAST_PAGES = 32  # filled in all layers: 2,048 tokens
DIFFERENT_PAGES = 8  # filled by the kernel; the others are copies of these
WHOLE_BYTES = 128 << 20  # of pages filled in all layers: what caches still hold when a layer's turn comes matters
FILLED_LAYERS = 3  # of the other pages: writing all of their layers would take most of the time
PASSES = 3  # over the layers at most, where they take little time
CALL_SECONDS = 0.6  # of one measurement at most, unless three calls take longer: medians gain little beyond


class HostMeter:
    """Medians over layers and repeats, of the thread's own seconds. Pages for `tokens` tokens in all, in random order
    as after a day's use, hold real keys and values; rows that attend at the same time have pages of their own.
    tokens: wanted; fewer where filling them takes more than `seconds`. whole: addresses of pages filled in all layers.
    """

    def __init__(self, host: HostAttention, config: ModelConfig, layout: KVLayout, tokens: int, seconds: float,
                 seed: int = 0):
        self.host, self.config, self.layout = host, config, layout
        self._rng = np.random.default_rng(seed)
        self._pool = PagePool(layout, max(pages_for(tokens), DIFFERENT_PAGES) * layout.page_bytes)
        self._held = self._pool.alloc_many(DIFFERENT_PAGES)
        every, some = range(layout.layers), range(min(FILLED_LAYERS, layout.layers))
        rows = HostRows(config, [HostSlice(self._addresses(), 0, DIFFERENT_PAGES * PAGE_TOKENS, prompt=True)])
        host.store(every, [self._qkv(rows.count) for _ in every], rows).result()
        self._fill(min(pages_for(tokens), max(WHOLE_BYTES // layout.page_bytes, LEAST_PAGES)), layout.page_bytes)
        self.whole = self._rng.permutation(self._addresses())
        part = len(some) * layout.kv_heads * layout.record_bytes  # at a page's beginning
        self._fill(pages_for(tokens), part, time.perf_counter() + seconds)
        self._pages: np.ndarray = self._rng.permutation(self._addresses())
        self.tokens = len(self._pages) * PAGE_TOKENS
        self._every, self._some = itertools.cycle(every), itertools.cycle(some)

    def decode(self, rows: int, tokens: int) -> HostRows:
        """A row of each of `rows` sequences, over `tokens` tokens, its own included."""
        return self._rows([(tokens - 1, 1)] * rows, False)

    def attention(self, rows: int, tokens: int, seconds: float) -> float:
        """One layer of decoding rows, keys and values written."""
        return self._median(self.decode(rows, tokens), seconds)

    def prompt(self, rows: int, before: int, seconds: float) -> float:
        """One layer of `rows` rows of a prompt behind `before` tokens."""
        return self._median(self._rows([(before, rows)], True), seconds)

    def run(self, rows: HostRows, qkv: np.ndarray) -> Attended:
        """The next layer; waits for it."""
        turns = self._every if self._small([(s.position, s.count) for s in rows.slices]) else self._some
        return self.host.submit(next(turns), qkv, rows).result()

    def qkv(self, rows: HostRows) -> np.ndarray:
        return self._qkv(rows.count)

    def close(self) -> None:
        """Gives the pages back; the thread stays its owner's."""
        while self._held:
            self._pool.release(self._held.pop())
        self._pool.trim()

    def _median(self, rows: HostRows, seconds: float) -> float:
        qkv = self._qkv(rows.count)
        found: list[float] = []
        self.run(rows, qkv)
        until = time.perf_counter() + min(seconds, CALL_SECONDS)
        while len(found) < 3 or (len(found) < PASSES * self.layout.layers and time.perf_counter() < until):
            found.append(self.run(rows, qkv).seconds)
        return median(found)

    def _rows(self, slices: list[tuple[int, int]], prompt: bool) -> HostRows:
        """Of sequences each: (position, rows)."""
        pages = self.whole if self._small(slices) else self._pages
        each = len(pages) // len(slices)
        return HostRows(self.config, [HostSlice(pages[b * each:(b + 1) * each], position, rows, prompt)
                                      for b, (position, rows) in enumerate(slices)])

    def _small(self, slices: list[tuple[int, int]]) -> bool:
        """Whether pages that are filled in all layers suffice."""
        return len(slices) * max(pages_for(position + rows) for position, rows in slices) <= len(self.whole)

    def _fill(self, count: int, nbytes: int, until: float = math.inf) -> None:
        """Up to `count` pages, whose first bytes are a copy of another's."""
        while len(self._held) < count and time.perf_counter() < until:
            source = self._pool.address(self._held[len(self._held) % DIFFERENT_PAGES])
            self._held.append(self._pool.alloc())
            ctypes.memmove(self._pool.address(self._held[-1]), source, nbytes)

    def _addresses(self) -> np.ndarray:
        return np.array([self._pool.address(page) for page in self._held], np.int64)

    def _qkv(self, rows: int) -> np.ndarray:
        return self._rng.standard_normal((rows, self.config.q_width + 2 * self.config.kv_width), np.float32)
