"""What happens to rows between matrix products: norm, SiLU x up, and the forms that products read.

A row is computed in float32 in the thread's scratch, then written as int8 with a scale per 32 (`matmul_tiles`), as
bf16 tiles (`matmul_amx`) or as float32 (`matmul_float`), by flags. Widths are padded to multiples of 32 with zeros.
"""
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.memory import fetch_add, i32_at, i64_at
from edge_runtime.kernels.step_state import FEW_ROWS
from edge_runtime.kernels.vector_ir import LANES, c64, f32, fill, i8, i16, i32, micro_kernel, vec, wide

OPERANDS = ("counter", "step", "rows_at", "index_at", "kind", "a", "a_stride", "b", "b_stride", "width", "true_width",
            "eps", "forms", "q", "q_stride", "q_scale", "q_scale_stride", "q_sum", "q_half", "q_half_stride", "bf16",
            "bf16_tiles", "out", "out_stride", "scratch", "scratch_stride", "q_low", "scale_low", "half_low")
(COUNTER, STEP, ROWS_AT, INDEX_AT, KIND, A, A_STRIDE, B, B_STRIDE, WIDTH, TRUE_WIDTH, EPS, FORMS, Q, Q_STRIDE, Q_SCALE,
 Q_SCALE_STRIDE, Q_SUM, Q_HALF, Q_HALF_STRIDE, BF16, BF16_TILES, OUT, OUT_STRIDE, SCRATCH, SCRATCH_STRIDE,
 Q_LOW, SCALE_LOW, HALF_LOW) = range(len(OPERANDS))
NORM, SILU, COPY = range(3)  # a: the row; b: norm weights, or the up projection's row
# Forms; with both INT8 and BF16_TILE few rows get the first, many rows the second. INT8_TWICE: what rounding to int8
# left is written in int8 too, at q_low, scale_low, half_low bytes from the first (see matmul_tiles).
INT8, BF16_TILE, FLOAT, INT8_TWICE = 1, 2, 4, 8
CHUNK = 4  # rows claimed at a time


def operands(**values: int):
    """eps: address of a float32; index_at: index in the step block of the address of int32 row numbers (its value may
    be 0: rows in order); width: padded; true_width: what the mean of squares divides by."""
    return memory.operands(OPERANDS, **values)


@micro_kernel
def norm_row(e, row, weight, width, true_width, eps, out):
    """out = row / rms(row) * weight, float32; width a multiple of 32."""
    b = e.b
    with e.loop(width, [fill(0.0, f32, LANES)] * 2, step=32) as l:
        at = b.add(row, b.mul(l.index, c64(4)))
        parts = [e.load(at, 64 * i, wide) for i in range(2)]
        l.next = [e.fma(p, p, s) for p, s in zip(parts, l.state)]
    mean = b.fdiv(e.reduce_add(b.fadd(*l.result)), b.sitofp(true_width, f32))
    root = e.call("llvm.sqrt.f32", f32, [b.fadd(mean, e.load(eps, 0, f32))])
    scale = e.splat(b.fdiv(ir.Constant(f32, 1.0), root))
    with e.loop(width, step=16) as l:
        at = b.mul(l.index, c64(4))
        value = b.fmul(e.load(b.add(row, at), 0, wide), scale)
        e.store(b.add(out, at), 0, b.fmul(value, e.load(b.add(weight, at), 0, wide)))


@micro_kernel
def silu_row(e, gate, up, width, out):
    """out = gate / (1 + exp(-gate)) * up."""
    b = e.b
    with e.loop(width, step=16) as l:
        at = b.mul(l.index, c64(4))
        g = e.load(b.add(gate, at), 0, wide)
        bounded = e.call("llvm.minnum.v16f32", wide, [e.negative(g), fill(88.0, f32, LANES)])
        sigmoid = b.fdiv(fill(1.0, f32, LANES), b.fadd(e.exp(bounded), fill(1.0, f32, LANES)))
        e.store(b.add(out, at), 0, b.fmul(b.fmul(g, sigmoid), e.load(b.add(up, at), 0, wide)))


@micro_kernel
def int8_row(e, row, width, q, scales, sums, halves):
    """int8 codes, float32 scale per 32, minus the sums of 32 and of 16 codes (int32)."""
    b = e.b
    with e.loop(width, step=32) as l:
        at = b.add(row, b.mul(l.index, c64(4)))
        x = [e.load(at, 64 * i, wide) for i in range(2)]
        top = e.reduce_max(e.maximum(e.absolute(x[0]), e.absolute(x[1])))
        # A maximum passes NaN over: the scale carries it on, so that logits show it.
        damaged = b.icmp_unsigned("!=", b.bitcast(b.fcmp_unordered("uno", x[0], x[1]), i16), ir.Constant(i16, 0))
        top = b.select(damaged, ir.Constant(f32, float("nan")), top)
        scale = b.fmul(top, ir.Constant(f32, 1 / 127))
        some = b.fcmp_ordered(">", top, ir.Constant(f32, 1e-30))
        inverse = e.splat(b.select(some, b.fdiv(ir.Constant(f32, 127.0), top), ir.Constant(f32, 0.0)))
        group = b.lshr(l.index, c64(5))
        e.store(b.add(scales, b.mul(group, c64(4))), 0, b.select(some, scale, top))
        total = ir.Constant(i32, 0)
        for i in range(2):
            code = e.round_to_int(e.maximum(e.call("llvm.minnum.v16f32", wide, [
                b.fmul(x[i], inverse), fill(127.0, f32, LANES)]), fill(-127.0, f32, LANES)))
            e.store(b.add(q, l.index), 16 * i, b.trunc(code, vec(i8, LANES)))
            half = b.sub(ir.Constant(i32, 0), e.call("llvm.vector.reduce.add.v16i32", i32, [code]))
            e.store(b.add(halves, b.mul(group, c64(8))), 4 * i, half)
            total = b.add(total, half)
        e.store(b.add(sums, b.mul(group, c64(4))), 0, total)


@micro_kernel
def residual_row(e, row, width, q, scales, out):
    """out = row - what its int8 form stands for."""
    b = e.b
    with e.loop(width, step=32) as l:
        scale = e.splat(e.load(b.add(scales, b.mul(b.lshr(l.index, c64(5)), c64(4))), 0, f32, 4))
        at = b.mul(l.index, c64(4))
        for i in range(2):
            code = b.sitofp(e.load(b.add(q, l.index), 16 * i, vec(i8, LANES)), wide)
            left = e.fma(e.negative(code), scale, e.load(b.add(row, at), 64 * i, wide))
            e.store(b.add(out, at), 64 * i, left)


@micro_kernel
def bf16_row(e, row, width, tiles):
    """One row of bf16 tiles: 32 values every KB, rounded to nearest even."""
    b = e.b
    with e.loop(width, step=32) as l:
        at = b.add(row, b.mul(l.index, c64(4)))
        out = b.add(tiles, b.mul(l.index, c64(32)))
        for i in range(2):
            bits = b.bitcast(e.load(at, 64 * i, wide), vec(i32, LANES))
            odd = b.and_(b.lshr(bits, fill(16, i32, LANES)), fill(1, i32, LANES))
            rounded = b.lshr(b.add(bits, b.add(odd, fill(0x7FFF, i32, LANES))), fill(16, i32, LANES))
            e.store(out, 32 * i, b.trunc(rounded, vec(i16, LANES)))


def make_rows() -> Callable:
    def rows_kernel(op, thread, threads):
        step = i64_at(op, STEP)
        rows, few, index = i64_at(step, i64_at(op, ROWS_AT)), i64_at(step, FEW_ROWS), i64_at(step, i64_at(op, INDEX_AT))
        counter, kind, forms = i64_at(op, COUNTER), i64_at(op, KIND), i64_at(op, FORMS)
        a, a_stride, b, b_stride = i64_at(op, A), i64_at(op, A_STRIDE), i64_at(op, B), i64_at(op, B_STRIDE)
        width, true_width, eps = i64_at(op, WIDTH), i64_at(op, TRUE_WIDTH), i64_at(op, EPS)
        row = i64_at(op, SCRATCH) + thread * i64_at(op, SCRATCH_STRIDE)
        while True:
            first = fetch_add(counter, CHUNK)
            if first >= rows:
                break
            for m in range(first, min(first + CHUNK, rows)):
                source = m
                if index != 0:
                    source = i32_at(index, m)
                value = a + source * a_stride
                if kind == NORM:
                    norm_row(value, b, width, true_width, eps, row)
                    value = row
                elif kind == SILU:
                    silu_row(value, b + source * b_stride, width, row)
                    value = row
                if forms & FLOAT:
                    memory.copy_bytes(i64_at(op, OUT) + m * i64_at(op, OUT_STRIDE), value, width * 4)
                if forms & INT8 and (m < few or not forms & BF16_TILE):
                    scales = m * i64_at(op, Q_SCALE_STRIDE)
                    codes, scale = i64_at(op, Q) + m * i64_at(op, Q_STRIDE), i64_at(op, Q_SCALE) + scales
                    sums, halves = i64_at(op, Q_SUM) + scales, i64_at(op, Q_HALF) + m * i64_at(op, Q_HALF_STRIDE)
                    int8_row(value, width, codes, scale, sums, halves)
                    if forms & INT8_TWICE:
                        low = i64_at(op, SCALE_LOW)
                        residual_row(value, width, codes, scale, row)
                        int8_row(row, width, codes + i64_at(op, Q_LOW), scale + low, sums + low,
                                 halves + i64_at(op, HALF_LOW))
                elif forms & BF16_TILE:
                    at = m - few
                    bf16_row(value, width,
                             i64_at(op, BF16) + (at // 16) * i64_at(op, BF16_TILES) * 1024 + (at % 16) * 64)

    return rows_kernel


def rows_kernel(progress: Progress | None = None) -> int:
    """Address of the kernel."""
    return compile_kernel(f"rows {current().name}", make_rows, progress)
