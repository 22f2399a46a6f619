"""The rows of a step whose KV lies in the host's pages, as the kernels read them: one table for all layers."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.devices.base import PAGE_TOKENS
from edge_runtime.kernels import step_state
from edge_runtime.kernels.attention_tasks import AttentionTasks
from edge_runtime.kernels.memory import aligned
from edge_runtime.models.config import ModelConfig

ROTARY = 2  # dimensions that the write kernel turns, by an angle of zero: queries and keys come rotated


@dataclass(frozen=True)
class HostSlice:
    """`count` rows of one sequence from `position` on, whose pages hold the tokens before. skip: leading tokens, a
    multiple of 64, that somebody else attends over. prompt: as in `devices.base.SequenceSlice`."""

    pages: np.ndarray
    position: int
    count: int = 1
    prompt: bool = False
    skip: int = 0


class HostRows:
    """Slices in the order of their rows, decoded ones first. Built once per token, used in every layer.

    write, attend: step states (int64, see kernels.step_state): where new keys and values go, and over which tokens the
    rows attend. tokens: KV that the rows attend over here, in all.
    """

    def __init__(self, config: ModelConfig, slices: Sequence[HostSlice]):
        if any(s.skip % PAGE_TOKENS or not 0 <= s.skip <= s.position for s in slices):
            raise ValueError(f"skipped tokens {[s.skip for s in slices]}: must be multiples of {PAGE_TOKENS} up to the "
                             f"position")
        order = [s.prompt for s in slices]
        if order != sorted(order):
            raise ValueError("decoded slices come before prompts")
        self.slices = tuple(slices)
        self.count = sum(s.count for s in slices)
        self.decoded = order.count(False)
        self.tokens = sum((s.position - s.skip) * s.count + s.count * (s.count + 1) // 2 for s in slices)
        self.partial = any(s.skip for s in slices)
        self._pages = [np.array(s.pages[:-(-(s.position + s.count) // PAGE_TOKENS)], np.int64) for s in slices]
        self._angles = aligned(self.count * ROTARY, np.float32).reshape(self.count, ROTARY)
        self._angles[:, 0] = 1.0  # cosine; the sine stays zero
        self._written = self._table(skipped=False)
        self._seen = self._table(skipped=True)
        self._tasks = AttentionTasks(config.head_size, config.group, config.kv_heads)
        self._tasks.build(self._seen, self.decoded)
        self.write = np.zeros(len(step_state.NAMES), np.int64)
        self.attend = np.zeros(len(step_state.NAMES), np.int64)
        for state, table in ((self.write, self._written), (self.attend, self._seen)):
            state[step_state.SLICE_COUNT], state[step_state.SLICES] = len(slices), table.ctypes.data
            state[step_state.ROPE] = self._angles.ctypes.data
        self._tasks.write(self.attend)

    def _table(self, skipped: bool) -> np.ndarray:
        table, first = np.zeros((max(1, len(self.slices)), 4), np.int64), 0
        for at, (s, pages) in enumerate(zip(self.slices, self._pages)):
            skip = s.skip if skipped else 0
            table[at] = first, s.count, s.position - skip, pages.ctypes.data + skip // PAGE_TOKENS * 8
            first += s.count
        return table[:len(self.slices)]
