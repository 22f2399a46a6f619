"""A page's softmax: from scores to weights, relative to the page's own maximum, and what links pages together.

A page's weights are then scaled to the running maximum: what is rounded in a page does not depend on the pages around
it. Scores are in base 2 and lie in `temp`, float32 [rows][4 columns][16 lanes].
"""
from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from edge_runtime.kernels.attention_block import HIDDEN, Block
from edge_runtime.kernels.attention_math import exp2, horizontal_max, nan_of, row_maxima, vmax
from edge_runtime.kernels.attention_prefetch import Prefetch
from edge_runtime.kernels.kv_record import COLUMNS
from edge_runtime.kernels.vector_ir import LANES, Emit, f32, fill, i32, ints, wide

WEIGHT = 16383.0  # 14 bits of a weight


@dataclass(frozen=True)
class Visible:
    """Which of a page's tokens the rows see. "all": every row all 64; "tokens": every row the first `tokens`; "rows":
    a row those below its limit in the block's state, and `tokens` are written (what follows may be anything).
    first: index of the page's first token."""

    mode: str
    first: ir.Value
    tokens: ir.Value

    def count(self, e: Emit, block: Block, state: ir.Value, row: int) -> ir.Value:
        """Tokens that row `row` sees, in every lane."""
        if self.mode == "tokens":
            return e.splat(e.b.trunc(self.tokens, i32), LANES)
        return e.splat(e.b.sub(e.load(state, block.limit + 4 * row, i32, 4), e.b.trunc(self.first, i32)), LANES)


def token_of(e: Emit, column) -> ir.Value:
    """Token of every lane of a column."""
    if isinstance(column, int):
        return ir.Constant(ints, [COLUMNS * i + column for i in range(LANES)])
    return e.b.add(token_of(e, 0), e.splat(e.b.trunc(column, i32), LANES))


def _row_scores(e: Emit, temp, row: int) -> list:
    return [e.load(temp, 256 * row + 64 * c, wide, 4) for c in range(COLUMNS)]


@dataclass(frozen=True)
class Maximum:
    """Page maxima, correction of what was summed before and factor of this page: row r in lane r."""

    tops: ir.Value
    correction: ir.Value
    factor: ir.Value


def page_maximum(e: Emit, block: Block, state, temp) -> Maximum:
    """Takes the page's maxima into m; leaves correction and factor in `temp` too."""
    b, rows = e.b, []
    for r in range(block.rows):
        x = _row_scores(e, temp, r)
        rows.append(vmax(e, vmax(e, x[0], x[1]), vmax(e, x[2], x[3])))
    tops, old = row_maxima(e, rows), e.load(state, block.m, wide, 4)
    new = vmax(e, tops, old)
    e.store(state, block.m, new, 4)
    correction = exp2(e, b.fsub(old, new))
    seen = b.fcmp_ordered(">", tops, fill(HIDDEN / 2, f32, LANES))
    factor = b.select(seen, exp2(e, b.fsub(tops, new)), fill(0.0, f32, LANES))
    e.store(temp, block.correction, correction, 4)
    e.store(temp, block.factor, factor, 4)
    return Maximum(tops, correction, factor)


def _row_weights(e: Emit, block: Block, state, temp, row: int, maximum: Maximum, degree: int) -> list:
    """exp2 of the row's scores below the page's maximum; adds them to l."""
    b = e.b
    lane = lambda x: e.shuffle(x, x, [row] * LANES)
    top = lane(maximum.tops)
    p = [exp2(e, b.fsub(x, top), degree) for x in _row_scores(e, temp, row)]
    total = b.fadd(b.fadd(p[0], p[1]), b.fadd(p[2], p[3]))
    kept = b.fmul(e.load(state, block.l + 64 * row, wide, 4), lane(maximum.correction))
    e.store(state, block.l + 64 * row, e.fma(total, lane(maximum.factor), kept), 4)
    return p


def _largest(e: Emit, scales: list) -> ir.Value:
    """Of 64 value scales, at least 1e-30."""
    largest = horizontal_max(e, vmax(e, vmax(e, scales[0], scales[1]), vmax(e, scales[2], scales[3])))
    least = ir.Constant(f32, 1e-30)
    return e.b.fadd(e.b.select(e.b.fcmp_ordered(">", largest, least), largest, least), nan_of(e, scales))


def page_weights(e: Emit, block: Block, scales: list, maximum: Maximum, state, temp, visible: Visible,
                 prefetch: Prefetch) -> None:
    """Codes of the page's int8 weights from the scores, the value scales and the rows' factors."""
    b = e.b
    if visible.mode != "rows":
        if visible.mode == "tokens":
            scales = _seen_scales(e, scales, visible.count(e, block, state, 0))
        largest = _largest(e, scales)
        unit = e.splat(b.fmul(largest, ir.Constant(f32, 1 / WEIGHT)), LANES)
        steps = e.splat(b.fdiv(ir.Constant(f32, WEIGHT), largest), LANES)
        scales = [b.fmul(s, steps) for s in scales]
        e.store(temp, block.factor + 64, b.fmul(maximum.factor, unit), 4)
    pairs, low_byte = fill(0x007F007F, i32, LANES), fill(0x3FFF, i32, LANES)
    shift = lambda n: fill(n, i32, LANES)
    for r in range(block.rows):
        p = _row_weights(e, block, state, temp, r, maximum, 4)  # 3e-6, a tenth of a code's step
        own = scales
        if visible.mode == "rows":
            own = _seen_scales(e, scales, visible.count(e, block, state, r))
            largest = _largest(e, own)
            steps = e.splat(b.fdiv(ir.Constant(f32, WEIGHT), largest), LANES)
            own = [b.fmul(s, steps) for s in own]
            unit = b.fmul(largest, ir.Constant(f32, 1 / WEIGHT))
            e.store(temp, block.factor + 64 + 4 * r, b.fmul(e.load(temp, block.factor + 4 * r, f32, 4), unit), 4)
        # p * scale <= 16383: adding 2^23 leaves the rounded integer in the low bits.
        w = [b.bitcast(e.fma(x, s, fill(8388608.0, f32, LANES)), ints) for x, s in zip(p, own)]
        even = b.or_(b.and_(w[0], low_byte), b.shl(w[2], shift(16)))
        odd = b.or_(b.and_(w[1], low_byte), b.shl(w[3], shift(16)))
        low = b.or_(b.and_(even, pairs), b.shl(b.and_(odd, pairs), shift(8)))
        high = b.or_(b.and_(b.lshr(even, shift(7)), pairs), b.shl(b.and_(b.lshr(odd, shift(7)), pairs), shift(8)))
        e.store(temp, block.high_weights + 64 * r, high, 4)
        e.store(temp, block.low_weights + 64 * r, low, 4)
        prefetch.weights(r)


def _seen_scales(e: Emit, scales: list, count) -> list:
    return [e.b.select(e.b.icmp_signed("<", token_of(e, c), count), scale, fill(0.0, f32, LANES))
            for c, scale in enumerate(scales)]


def float_weights(e: Emit, block: Block, maximum: Maximum, state, temp, prefetch: Prefetch) -> None:
    """Weights in the place of the scores, for fp16 values."""
    for r in range(block.rows):
        for c, p in enumerate(_row_weights(e, block, state, temp, r, maximum, 5)):
            e.store(temp, 256 * r + 64 * c, p, 4)
        prefetch.weights(r)
