"""The thread team: every operation is done by all threads before the next starts, whether they sleep or spin."""
from __future__ import annotations

import time

import numpy as np
import pytest

from edge_runtime.errors import DeviceError
from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import compile_kernel
from edge_runtime.kernels.memory import fetch_add, i64_at, set_i64
from edge_runtime.kernels.team import Operation, Program, Team


def make_add():
    """target[i] = source[i] + 1 for claimed i."""

    def add(op, thread, threads):
        while True:
            i = fetch_add(i64_at(op, 0), 1)
            if i >= i64_at(op, 3):
                break
            set_i64(i64_at(op, 2), i, i64_at(i64_at(op, 1), i) + 1)

    return add


def chain(length: int, count: int) -> tuple[Program, list[np.ndarray]]:
    kernel = compile_kernel("test add", make_add)
    arrays = [np.zeros(count, np.int64) for _ in range(length + 1)]
    operations = [Operation(f"add {i}", kernel, memory.operands(
        ("counter", "source", "target", "count"), counter=0, source=arrays[i].ctypes.data,
        target=arrays[i + 1].ctypes.data, count=count)) for i in range(length)]
    return Program(operations), arrays


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_operation_sees_all_of_the_one_before(threads):
    program, arrays = chain(50, 37)
    team = Team(threads)
    try:
        for turn in range(20):
            arrays[0][:] = turn
            team.run(program)
            assert np.array_equal(arrays[-1], np.full(37, turn + 50))
            if turn % 7 == 0:
                time.sleep(0.02)  # long enough for the workers to sleep
    finally:
        team.close()


def test_a_closed_team_says_so_and_bad_sizes_are_refused():
    team = Team(2)
    team.close()
    team.close()
    with pytest.raises(DeviceError, match="closed"):
        team.run(chain(1, 1)[0])
    with pytest.raises(DeviceError, match="threads=0"):
        Team(0)
