"""Task tables: every page of every row once, whichever way they are built."""
from __future__ import annotations

import time

import numpy as np
import pytest

from edge_runtime.kernels import attention_tasks, step_state
from edge_runtime.kernels.attention_tasks import AttentionTasks


def table(slices) -> np.ndarray:
    rows, first = [], 0
    for i, (position, count) in enumerate(slices):
        rows.append((first, count, position, 1000 + i))
        first += count
    return np.array(rows, np.int64).reshape(-1, 4)


@pytest.mark.parametrize("count", [1, 3, 6, 7, 40])
def test_every_page_of_a_decoded_row_once(count):
    rng = np.random.default_rng(count)
    print("seed", count)
    slices = table([(int(p), 1) for p in rng.integers(0, 40_000, count)])
    tasks = AttentionTasks(64, 4, 8)
    tasks.build(slices)
    found = tasks.tasks[:tasks.task_count]
    assert (np.diff(found[:, 4]) <= 0).all()  # longest sequences first
    slots = []
    for first, _, position, pages in slices.tolist():
        mine = found[found[:, 0] == first]
        seen = np.concatenate([np.arange(begin, end) for begin, end in mine[:, 2:4]])
        assert np.array_equal(seen, np.arange(position // 64 + 1))
        assert (mine[:, 1] == pages).all() and (mine[:, 4] == position + 1).all()
        assert np.array_equal(mine[:, 5], np.arange(len(mine))) and (mine[:, 6] == len(mine)).all()
        assert len(mine) <= attention_tasks.MOST_PIECES
        if len(mine) > 1:
            slots += list(mine[0, 7] + np.arange(len(mine)))
    assert len(set(slots)) == len(slots) and (not slots or max(slots) < len(slots))


def test_both_ways_of_building_agree():
    slices = table([(p, 1) for p in (0, 63, 64, 511, 512, 4095, 20_000, 700, 513)])
    few, many = AttentionTasks(128, 8, 4), AttentionTasks(128, 8, 4)
    few._build_few(slices.tolist())
    many._build_many(slices)
    assert np.array_equal(few.tasks[:few.task_count], many.tasks[:many.task_count])


def test_prompts_are_cut_into_blocks_and_rows_may_be_decoded_one_by_one():
    slices = table([(10, 3), (0, 200), (500, 1)])
    tasks = AttentionTasks(64, 4, 8)
    tasks.build(slices, decode_slices=1)
    assert sorted(tasks.tasks[:tasks.task_count, [0, 4]].tolist()) == [[0, 11], [1, 12], [2, 13]]
    found = tasks.prefill_tasks[:tasks.prefill_count]
    rows = np.concatenate([np.arange(first, first + count) for first, count in found[:, :2]])
    assert sorted(rows) == list(range(3, 204))
    assert (np.diff(found[:, 1] + found[:, 2]) <= 0).all()
    state = np.zeros(len(step_state.NAMES), np.int64)
    tasks.write(state)
    assert state[step_state.TASK_COUNT] == 3 and state[step_state.PREFILL_COUNT] == len(found)
    tasks.build(table([]))
    assert tasks.task_count == tasks.prefill_count == 0


def test_building_for_one_row_is_cheap():
    slices, tasks = table([(4000, 1)]), AttentionTasks(64, 4, 8)
    state = np.zeros(len(step_state.NAMES), np.int64)
    best = 1.0
    for _ in range(200):
        began = time.perf_counter()
        tasks.build(slices)
        tasks.write(state)
        best = min(best, time.perf_counter() - began)
    assert best < 1e-4, best  # 20 us on a quiet machine
