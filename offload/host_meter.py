"""How long the host takes for its half of a layer, over pages of its own."""
from __future__ import annotations

import itertools
import time
from statistics import median

import numpy as np

from edge_runtime.devices.base import PAGE_TOKENS, KVLayout
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.host_attention import Attended, HostAttention
from edge_runtime.offload.host_rows import HostRows, HostSlice
from edge_runtime.offload.pages import PagePool, pages_for

DIFFERENT_PAGES = 8  # filled by the kernel; the others are copies of these
PASSES = 3  # over the layers at most, where they take little time


class HostMeter:
    """Medians over layers and repeats, of the thread's own seconds. Pages for `tokens` tokens in all, in random order
    as after a day's use, hold real keys and values; rows that attend at the same time have pages of their own."""

    def __init__(self, host: HostAttention, config: ModelConfig, layout: KVLayout, tokens: int, seed: int = 0):
        self.host, self.config, self.layout = host, config, layout
        self._rng = np.random.default_rng(seed)
        self._turns = itertools.cycle(range(layout.layers))
        count = max(DIFFERENT_PAGES, pages_for(tokens))
        self.tokens = count * PAGE_TOKENS
        self._pool = PagePool(layout, count * layout.page_bytes)
        pages = self._pool.alloc_many(DIFFERENT_PAGES)
        addresses = np.array([self._pool.address(page) for page in pages], np.int64)
        rows = HostRows(config, [HostSlice(addresses, 0, DIFFERENT_PAGES * PAGE_TOKENS, prompt=True)])
        host.store(range(layout.layers), [self._qkv(rows.count) for _ in range(layout.layers)], rows).result()
        self._held = pages + [self._pool.copy(pages[i % DIFFERENT_PAGES]) for i in range(DIFFERENT_PAGES, count)]
        addresses = np.array([self._pool.address(page) for page in self._held], np.int64)
        self.pages: np.ndarray = self._rng.permutation(addresses)

    def decode(self, rows: int, tokens: int) -> HostRows:
        """A row of each of `rows` sequences, over `tokens` tokens, its own included."""
        each = len(self.pages) // rows
        return HostRows(self.config, [HostSlice(self.pages[b * each:(b + 1) * each], tokens - 1) for b in range(rows)])

    def attention(self, rows: int, tokens: int, seconds: float) -> float:
        """One layer of decoding rows, keys and values written."""
        return self._median(self.decode(rows, tokens), seconds)

    def prompt(self, rows: int, before: int, seconds: float) -> float:
        """One layer of `rows` rows of a prompt behind `before` tokens."""
        return self._median(HostRows(self.config, [HostSlice(self.pages, before, rows, prompt=True)]), seconds)

    def run(self, rows: HostRows, qkv: np.ndarray) -> Attended:
        """The next layer; waits for it."""
        return self.host.submit(next(self._turns), qkv, rows).result()

    def qkv(self, rows: HostRows) -> np.ndarray:
        return self._qkv(rows.count)

    def close(self) -> None:
        """Gives the pages back; the thread stays its owner's."""
        while self._held:
            self._pool.release(self._held.pop())
        self._pool.trim()

    def _median(self, rows: HostRows, seconds: float) -> float:
        qkv, found = self._qkv(rows.count), []
        self.run(rows, qkv)
        until = time.perf_counter() + seconds
        while len(found) < 3 or (len(found) < PASSES * self.layout.layers and time.perf_counter() < until):
            found.append(self.run(rows, qkv).seconds)
        return median(found)

    def _qkv(self, rows: int) -> np.ndarray:
        return self._rng.standard_normal((rows, self.config.q_width + 2 * self.config.kv_width), np.float32)
