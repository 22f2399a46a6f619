"""Memory bandwidth: every thread reads its part of a large array with vector loads, and keeps only an XOR of it."""
from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from llvmlite import ir

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.memory import aligned, i64_at
from edge_runtime.kernels.team import Operation, Program, Team
from edge_runtime.kernels.vector_ir import Emit, fill, i64, micro_kernel, vec

OPERANDS = ("counter", "data", "nbytes", "out")
STREAMS = 8  # loads of 64 bytes in flight per turn: one accumulator would wait for each XOR in turn
TURN = 64 * STREAMS


def make_read() -> Callable:
    def read(e: Emit, data: ir.Value, nbytes: ir.Value, out: ir.Value) -> None:
        line = vec(i64, 8)
        with e.loop(nbytes, [fill(0, i64, 8)] * STREAMS, step=TURN) as loop:
            at = e.b.add(data, loop.index)
            loop.next = [e.b.xor(sum_, e.load(at, 64 * k, line)) for k, sum_ in enumerate(loop.state)]
        total = loop.result[0]
        for other in loop.result[1:]:
            total = e.b.xor(total, other)
        e.store(out, 0, total)

    read_part = micro_kernel(read)

    def kernel(op, thread, threads):
        turns = i64_at(op, 2) // TURN
        first, last = turns * thread // threads, turns * (thread + 1) // threads
        read_part(i64_at(op, 1) + first * TURN, (last - first) * TURN, i64_at(op, 3) + 64 * thread)

    return kernel


def read_kernel(progress: Progress | None = None) -> int:
    """Reads `nbytes` (a multiple of 512) at `data`; each thread leaves an XOR of its part, 64 bytes, in `out`."""
    return compile_kernel("read", make_read, progress)


def measure_bandwidth(threads: int | None = None, nbytes: int = 512 << 20, repeat: int = 7,
                      progress: Progress | None = None) -> float:
    """Bytes per second that `threads` threads (None: all physical cores) read from memory, in the best of `repeat`
    passes over an array of `nbytes`, which must be far larger than the caches."""
    team = Team(threads, progress)
    try:
        data = np.ones(nbytes // TURN * TURN + memory.LINE, np.uint8)  # ones: pages of zeros may be one page
        out = aligned(team.threads * 8, np.int64)
        start = data.ctypes.data + -data.ctypes.data % memory.LINE
        size = nbytes // TURN * TURN
        program = Program([Operation("read", read_kernel(progress), memory.operands(
            OPERANDS, counter=0, data=start, nbytes=size, out=out.ctypes.data))])
        team.run(program)
        seconds = []
        for _ in range(repeat):
            began = time.perf_counter()
            team.run(program)
            seconds.append(time.perf_counter() - began)
        return size / min(seconds)
    finally:
        team.close()
