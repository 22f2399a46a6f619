"""Who attends to what in a step: pieces of decoded rows and blocks of prompt rows, one table for all layers."""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edge_runtime.kernels.attention_block import part_floats
from edge_runtime.kernels.attention_decode import TASK_FIELDS as DECODE_FIELDS
from edge_runtime.kernels.attention_prefill import TASK_FIELDS as PREFILL_FIELDS
from edge_runtime.kernels.attention_prefill import prefill_rows
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.row_tables import MOST_PIECES, PIECE_PAGES
from edge_runtime.kernels.step_state import MERGES, PARTIALS, PREFILL_COUNT, PREFILL_TASKS, TASK_COUNT, TASKS

FEW = 6  # slices up to which plain Python is faster than NumPy


def piece_pages(pages: int) -> int:
    """Pages of a piece of a row that sees `pages` pages. Depends on nothing else, so that batches change no result."""
    return max(PIECE_PAGES, -(-pages // MOST_PIECES))


class AttentionTasks:
    """Task tables and the memory for partial results, reused from step to step. Not thread-safe.

    `build` fills the tables, `write` enters them into a step state (int64, see step_state)."""

    def __init__(self, head_size: int, group: int, kv_heads: int):
        self.kv_heads = kv_heads
        self.prefill_rows = prefill_rows(group)
        self.task_count = self.prefill_count = 0
        self._slot_floats = kv_heads * group * part_floats(head_size)
        self.tasks = np.zeros((64, len(DECODE_FIELDS)), np.int64)
        self.prefill_tasks = np.zeros((64, len(PREFILL_FIELDS)), np.int64)
        self._reserve(0)

    def _reserve(self, slots: int) -> None:
        """Memory for the partial results of `slots` pieces; arrival counters are zero between steps."""
        self._slots = slots
        self.partials = aligned(max(1, slots) * self._slot_floats, np.float32)
        self.arrivals = aligned(max(1, slots) * self.kv_heads, np.int64)
        self._addresses = (self.partials.ctypes.data, self.arrivals.ctypes.data)

    def build(self, slices: np.ndarray, decode_slices: int | None = None) -> None:
        """slices: int64 [n, 4] (first row, rows, position, address of page addresses). The first `decode_slices` are
        attended row by row by the decode kernel, the others in blocks by the prefill kernel; None: the slices of one
        row are decoded, wherever they stand."""
        if decode_slices is None:
            single = slices[:, 1] == 1
            decode, prefill = slices[single], slices[~single]
        else:
            decode, prefill = slices[:decode_slices], slices[decode_slices:]
        self._build_prefill(prefill.tolist())
        if len(decode) and int(decode[:, 1].max()) > 1:
            decode = _single_rows(decode)
        if len(decode) <= FEW:
            self._build_few(decode.tolist())
        else:
            self._build_many(decode)

    def _build_few(self, rows: list[list[int]]) -> None:
        tasks: list[tuple[int, ...]] = []
        slot = 0
        for row, _, position, pages in sorted(rows, key=lambda s: -s[2]):
            tokens = position + 1
            count = (tokens + 63) >> 6
            step = piece_pages(count)
            pieces = -(-count // step)
            tasks.extend((row, pages, k * step, min(count, (k + 1) * step), tokens, k, pieces, slot)
                         for k in range(pieces))
            if pieces > 1:
                slot += pieces
        self._take(len(tasks), slot)
        if tasks:
            self.tasks[:len(tasks)] = tasks

    def _build_many(self, rows: np.ndarray) -> None:
        rows = rows[np.argsort(-rows[:, 2], kind="stable")]
        tokens = rows[:, 2] + 1
        count = (tokens + 63) >> 6
        step = np.maximum(PIECE_PAGES, -(-count // MOST_PIECES))
        pieces = -(-count // step)
        ends = np.cumsum(pieces)
        kept = np.where(pieces > 1, pieces, 0)
        slots = np.cumsum(kept)
        total = int(ends[-1])
        self._take(total, int(slots[-1]))
        owner = np.repeat(np.arange(len(rows)), pieces)
        piece = np.arange(total) - (ends - pieces)[owner]
        table = self.tasks[:total]
        table[:, 0], table[:, 1] = rows[owner, 0], rows[owner, 3]
        table[:, 2] = piece * step[owner]
        table[:, 3] = np.minimum(table[:, 2] + step[owner], count[owner])
        table[:, 4], table[:, 5], table[:, 6] = tokens[owner], piece, pieces[owner]
        table[:, 7] = (slots - kept)[owner]

    def reserve(self, positions: Iterable[int]) -> None:
        """Memory for the pieces of decoded rows at `positions`, for tables that are filled inside the step."""
        tasks = slots = 0
        for position in positions:
            count = (position + 64) >> 6
            pieces = -(-count // piece_pages(count))
            tasks += pieces
            slots += pieces if pieces > 1 else 0
        self._take(tasks, slots)

    def _take(self, tasks: int, slots: int) -> None:
        if tasks > len(self.tasks):
            self.tasks = np.zeros((2 * tasks, len(DECODE_FIELDS)), np.int64)
        if slots > self._slots:
            self._reserve(slots + slots // 2)
        self.task_count = tasks

    def _build_prefill(self, slices: list[list[int]]) -> None:
        size = self.prefill_rows
        tasks = [(row + at, min(size, rows - at), position + at, pages)
                 for row, rows, position, pages in slices for at in range(0, rows, size)]
        tasks.sort(key=lambda t: -(t[2] + t[1]))
        if len(tasks) > len(self.prefill_tasks):
            self.prefill_tasks = np.zeros((2 * len(tasks), len(PREFILL_FIELDS)), np.int64)
        self.prefill_count = len(tasks)
        if tasks:
            self.prefill_tasks[:len(tasks)] = tasks

    def write(self, state: np.ndarray) -> None:
        """Enters the tables into a step state, int64 [len(step_state.NAMES)]."""
        state[TASK_COUNT], state[TASKS] = self.task_count, self.tasks.ctypes.data
        state[PREFILL_COUNT], state[PREFILL_TASKS] = self.prefill_count, self.prefill_tasks.ctypes.data
        state[PARTIALS], state[MERGES] = self._addresses


def _single_rows(slices: np.ndarray) -> np.ndarray:
    """Every row of the slices as a slice of its own."""
    counts = slices[:, 1]
    rows = np.repeat(slices, counts, axis=0)
    inside = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows[:, 0] += inside
    rows[:, 2] += inside
    rows[:, 1] = 1
    return rows
