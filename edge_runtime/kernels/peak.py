"""What the arithmetic units can do at best: products of bytes in registers, and matrix tiles where there are some."""
from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from llvmlite import ir

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.matmul_amx import load_config, release_tiles, tile_config
from edge_runtime.kernels.memory import aligned, i64_at
from edge_runtime.kernels.team import Operation, Program, Team
from edge_runtime.kernels.vector_ir import LANES, Emit, bytes64, c64, fill, i8, i32, micro_kernel

OPERANDS = ("counter", "turns", "data", "out", "config")
TILE_OPERATIONS = 2 * 16 * 16 * 32  # of one product of bf16 tiles: 16 x 32 by 32 x 16


def make_dots(chains: int) -> Callable:
    def dots(e: Emit, turns: ir.Value, data: ir.Value, out: ir.Value) -> None:
        # Every product differs from every other, in this turn and the last, or the compiler would compute it once.
        codes = [e.load(data, 64 * k, bytes64) for k in range(chains)]
        with e.loop(turns, [fill(0, i32, LANES)] * chains) as loop:
            at = e.b.add(data, e.b.and_(loop.index, c64(7 * 64)))
            signed = e.load(at, 64 * chains, bytes64)
            loop.next = [e.dot(acc, code, signed, 15) for acc, code in zip(loop.state, codes)]
        total = loop.result[0]
        for other in loop.result[1:]:
            total = e.b.add(total, other)
        e.store(out, 0, total)

    part = micro_kernel(dots)

    def kernel(op, thread, threads):
        part(i64_at(op, 1), i64_at(op, 2), i64_at(op, 3) + 64 * thread)

    return kernel


def make_tiles() -> Callable:
    def tiles(e: Emit, turns: ir.Value, data: ir.Value) -> None:
        number = lambda n: ir.Constant(i8, n)
        stride = ir.Constant(ir.IntType(64), 64)
        for tile in range(4):
            e.call("llvm.x86.tilezero", ir.VoidType(), [number(tile)])
        for tile in range(4, 8):
            e.call("llvm.x86.tileloadd64", ir.VoidType(), [number(tile), e.pointer(data, i8), stride])
        with e.loop(turns):
            for tile in range(4):
                e.call("llvm.x86.tdpbf16ps", ir.VoidType(), [number(tile), number(4 + tile % 2), number(6 + tile // 2)])

    part = micro_kernel(tiles)

    def kernel(op, thread, threads):
        load_config(i64_at(op, 4))
        part(i64_at(op, 1), i64_at(op, 2))
        release_tiles()

    return kernel


def measure_peak(threads: int | None = None, progress: Progress | None = None) -> dict[str, float]:
    """Operations per second (a product and its sum are two) of `threads` threads, best of five: "int8" on vectors,
    and "bf16 tiles" where the instruction set in use has matrix tiles."""
    isa = current()
    chains = 12 if isa.columns > 2 else 3  # enough to hide the latency, few enough for the registers
    team = Team(threads, progress)
    try:
        found = {"int8": _rate(team, compile_kernel(f"peak dots {isa.name}", lambda: make_dots(chains), progress),
                               chains * 2 * 64)}
        if isa.matrix_tiles:
            found["bf16 tiles"] = _rate(team, compile_kernel("peak tiles", make_tiles, progress), 4 * TILE_OPERATIONS)
        return found
    finally:
        team.close()


def _rate(team: Team, kernel: int, operations_per_turn: int, turns: int = 1_000_000) -> float:
    data, out, config = aligned(2048, np.uint8), aligned(16 * team.threads, np.int32), tile_config()
    block = memory.operands(OPERANDS, counter=0, turns=turns, data=data.ctypes.data, out=out.ctypes.data,
                            config=config.ctypes.data)
    program = Program([Operation("peak", kernel, block)])
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        team.run(program)
        seconds.append(time.perf_counter() - began)
    return operations_per_turn * turns * team.threads / min(seconds[1:])
