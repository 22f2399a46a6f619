"""The tables of decoded rows (see step_state), filled inside a step: early exit changes which rows there are.

`enter_rows` does for decoded rows what `AttentionTasks.build` and `RopeTable.fill` do before a step.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

from edge_runtime.kernels.kv_record import sources_digest
from edge_runtime.kernels.memory import copy_bytes, i64_at, set_i64
from edge_runtime.kernels.step_state import ROPE, SLICES, TASK_COUNT, TASKS

PIECE_PAGES = 8  # 512 tokens: shorter pieces cost more to start and merge than they gain in balance
MOST_PIECES = 16  # of one row and kv head
ROW_BITS = 20  # of a sorting key: tokens above, row below


def digest() -> str:
    """Part of the names of kernels that are built with this file."""
    return sources_digest("row_tables.py", "step_state.py")


@cache
def enter_rows() -> Callable:
    """`enter(state, slices, order, rope_source, rope_bytes)`: fills cosines and tasks of the rows that the first
    `slices` entries of the slice table stand for. order: int64 [2 * rows] of scratch; rope_source: of position 0."""
    from numba import njit

    def enter(state, slices, order, rope_source, rope_bytes):
        table, rope, tasks = i64_at(state, SLICES), i64_at(state, ROPE), i64_at(state, TASKS)
        rows = 0
        for s in range(slices):
            first, count = i64_at(table, 4 * s), i64_at(table, 4 * s + 1)
            position, pages = i64_at(table, 4 * s + 2), i64_at(table, 4 * s + 3)
            copy_bytes(rope + first * rope_bytes, rope_source + position * rope_bytes, count * rope_bytes)
            for i in range(count):
                key = ((position + i + 1) << ROW_BITS) | (first + i)
                at = rows  # longest first, so that the threads end together
                while at > 0 and i64_at(order, 2 * at - 2) < key:
                    set_i64(order, 2 * at, i64_at(order, 2 * at - 2))
                    set_i64(order, 2 * at + 1, i64_at(order, 2 * at - 1))
                    at -= 1
                set_i64(order, 2 * at, key)
                set_i64(order, 2 * at + 1, pages)
                rows += 1
        written, slot = 0, 0
        for r in range(rows):
            key, pages = i64_at(order, 2 * r), i64_at(order, 2 * r + 1)
            tokens, row = key >> ROW_BITS, key & ((1 << ROW_BITS) - 1)
            count = (tokens + 63) >> 6
            step = max(PIECE_PAGES, (count + MOST_PIECES - 1) // MOST_PIECES)
            pieces = (count + step - 1) // step
            for piece in range(pieces):
                task = tasks + 64 * written
                set_i64(task, 0, row)
                set_i64(task, 1, pages)
                set_i64(task, 2, piece * step)
                set_i64(task, 3, min(count, (piece + 1) * step))
                set_i64(task, 4, tokens)
                set_i64(task, 5, piece)
                set_i64(task, 6, pieces)
                set_i64(task, 7, slot)
                written += 1
            if pieces > 1:
                slot += pieces
        set_i64(state, TASK_COUNT, written)

    return njit(enter)
