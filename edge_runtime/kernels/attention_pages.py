"""Attention over one page with vectors: what decode, and prefill without matrix tiles, are made of.

A block is up to 8 query rows (the heads of a group, or rows of a prompt) that visit a page together; its running
state lives in scratch memory. Scores are kept in base 2: log2(e) / sqrt(D) is folded into the query.

    int8 KV   query = scale * (high + low / 254), two int8 codes: 15 bits, far finer than the keys' 8.
              weights of a page = (128 * high + low) * largest / 16383, two 7-bit codes with the tokens' value scales
              folded in: values are two integer passes as well, and small errors of a weight do not add up.
    fp16 KV   float32 products.

A page's weights are taken relative to the page's own maximum, then scaled to the running one: what is rounded in a
page does not depend on the pages around it.
"""
from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from edge_runtime.kernels.attention_block import HIDDEN, LOW, Block
from edge_runtime.kernels.attention_math import broadcast, exp2, horizontal_max, nan_of, vmax
from edge_runtime.kernels.kv_record import COLUMNS
from edge_runtime.kernels.tiles import weight_bias
from edge_runtime.kernels.vector_ir import LANES, Emit, bytes64, c64, f16, f32, fill, i8, i32, ints, vec, wide

WEIGHT = 16383.0  # 14 bits of a weight


def _divisor(count: int, limit: int) -> int:
    return max(d for d in range(1, max(1, limit) + 1) if count % d == 0)


def _accumulators(e: Emit) -> int:
    """Vectors of 16 lanes that stay in registers."""
    return 16 if e.isa.dot == "vnni512" else 4


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


def streams(size: int) -> int:
    """Parts of a record that are prefetched side by side, about one per 4 KiB page: the processor's own prefetcher
    follows one stream per page, and runs ahead of each (16 KiB records: 14 against 12 GB/s a thread)."""
    parts = 1
    while parts < 4 and parts * 2 * 4096 <= size and size // 64 % (parts * 2) == 0:
        parts *= 2
    return parts


def prefetch_line(e: Emit, following: ir.Value, size: int, at: ir.Value | int) -> None:
    """Prefetches a line of the record at `following` when the line at offset `at` of this one is read. Into the second
    level: it takes more lines at once than the first (11 against 9 GB/s a thread)."""
    parts = streams(size)
    part_bytes = size // parts
    if isinstance(at, int):
        line = at // 64
        e.prefetch(following, line % parts * part_bytes + line // parts * 64, 2)
        return
    b = e.b
    line = b.lshr(at, c64(6))
    part = b.and_(line, c64(parts - 1))
    within = b.shl(b.lshr(line, c64(parts.bit_length() - 1)), c64(6))
    e.prefetch(following, b.add(b.mul(part, c64(part_bytes)), within), 2)


class Prefetch:
    """Spreads the next record's lines from offset `first` on over `points` places of the code."""

    def __init__(self, e: Emit, following: ir.Value, size: int, points: int, first: int = 0):
        self._e, self._following, self._size, self._points = e, following, size, points
        self._lines = list(range(first, size, 64))

    def some(self) -> None:
        count = -(-len(self._lines) // max(1, self._points))
        for line in self._lines[:count]:
            prefetch_line(self._e, self._following, self._size, line)
        del self._lines[:count]
        self._points -= 1


def page_step(e: Emit, block: Block, page: ir.Value, following: ir.Value, state: ir.Value, temp: ir.Value,
              visible: Visible) -> None:
    """One page of the block's attention. page, following: addresses of this record and of the next (prefetched)."""
    if block.layout.int8:
        _scores_int8(e, block, page, following, state, temp, visible)
        lay, factor = block.layout, page_maximum(e, block, state, temp)
        scales = [e.load(page, lay.v_scale_at + 64 * c, wide, 4) for c in range(COLUMNS)]
        rest = Prefetch(e, following, lay.bytes, block.rows, lay.k_scale_at)
        page_weights(e, block, scales, factor, state, temp, visible, rest)
        _values_int8(e, block, page, following, state, temp)
    else:
        _scores_fp16(e, block, page, following, state, temp, visible)
        _weights_fp16(e, block, state, temp)
        _values_fp16(e, block, page, following, state, temp, visible.tokens)


def token_of(e: Emit, column) -> ir.Value:
    """Token of every lane of a column."""
    if isinstance(column, int):
        return ir.Constant(ints, [COLUMNS * i + column for i in range(LANES)])
    return e.b.add(token_of(e, 0), e.splat(e.b.trunc(column, i32), LANES))


def _store_scores(e: Emit, block: Block, state, temp, visible: Visible, row: int, column, x) -> None:
    """Hides the tokens that the row does not see."""
    b = e.b
    if visible.mode != "all":
        seen = b.icmp_signed("<", token_of(e, column), visible.count(e, block, state, row))
        x = b.select(seen, x, fill(HIDDEN, f32, LANES))
    e.store(temp, b.add(b.mul(column, c64(64)), c64(256 * row)), x, 4)


def _scores_int8(e: Emit, block: Block, page, following, state, temp, visible: Visible) -> None:
    b, lay = e.b, block.layout
    budget = _accumulators(e)
    many = min(block.rows, budget // 2)
    columns = _divisor(COLUMNS, budget // (2 * many))
    unroll = 2 if budget == 16 else 1
    flip = fill(-128, i8, 64) if weight_bias(e.isa) else None
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(COLUMNS // columns)) as outer:
            column = b.mul(outer.index, c64(columns))
            keys_at = b.mul(column, c64(lay.column_bytes))
            zero = [broadcast(e, state, offset + 4 * r, i32) for r in rows for offset in (block.sums, block.low_sums)]
            with e.loop(c64(lay.padded // 4), zero * columns, step=unroll) as inner:
                acc = list(inner.state)
                for u in range(unroll):
                    step = b.add(inner.index, c64(u))
                    query = e.at(state, b.mul(step, c64(4)))
                    q = [broadcast(e, query, part + r * block.row_bytes, i32) for r in rows for part in (0, block.low)]
                    for c in range(columns):
                        at = b.add(b.add(keys_at, c64(c * lay.column_bytes)), b.mul(step, c64(64)))
                        keys = e.load(page, at, bytes64)
                        if flip is not None:
                            keys = b.xor(keys, flip)
                        if start == 0:
                            prefetch_line(e, following, lay.bytes, at)
                        for k, codes in enumerate(q):
                            acc[c * len(q) + k] = e.dot(acc[c * len(q) + k], keys, codes)
                inner.next = acc
            for c in range(columns):
                here = b.add(column, c64(c))
                scales = e.load(page, b.add(b.mul(here, c64(64)), c64(lay.k_scale_at)), wide, 4)
                for k, r in enumerate(rows):
                    high, low = inner.result[c * len(zero) + 2 * k:c * len(zero) + 2 * k + 2]
                    x = e.fma(e.to_float(low), fill(1 / LOW, f32, LANES), e.to_float(high))
                    x = b.fmul(x, b.fmul(scales, broadcast(e, state, block.scale + 4 * r)))
                    _store_scores(e, block, state, temp, visible, r, here, x)


def _scores_fp16(e: Emit, block: Block, page, following, state, temp, visible: Visible) -> None:
    b, lay = e.b, block.layout
    budget = _accumulators(e)
    many = min(block.rows, budget)
    columns = _divisor(COLUMNS, budget // many)
    halves = vec(f16, LANES)
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(COLUMNS // columns)) as outer:
            column = b.mul(outer.index, c64(columns))
            keys_at = b.mul(column, c64(lay.column_bytes))
            with e.loop(c64(lay.padded), [fill(0.0, f32, LANES)] * (columns * len(rows)), step=2) as inner:
                acc = list(inner.state)
                for u in range(2):
                    step = b.add(inner.index, c64(u))
                    query = e.at(state, b.mul(step, c64(4)))
                    q = [broadcast(e, query, r * block.row_bytes) for r in rows]
                    for c in range(columns):
                        at = b.add(b.add(keys_at, c64(c * lay.column_bytes)), b.mul(step, c64(32)))
                        keys = e.half_to_float(e.load(page, at, halves))
                        if start == 0 and u == 0:
                            prefetch_line(e, following, lay.bytes, at)
                        for k, value in enumerate(q):
                            acc[c * len(q) + k] = e.fma(keys, value, acc[c * len(q) + k])
                inner.next = acc
            for c in range(columns):
                for k, r in enumerate(rows):
                    _store_scores(e, block, state, temp, visible, r, b.add(column, c64(c)),
                                  inner.result[c * len(rows) + k])


def _row_scores(e: Emit, temp, row: int) -> list:
    return [e.load(temp, 256 * row + 64 * c, wide, 4) for c in range(COLUMNS)]


def page_maximum(e: Emit, block: Block, state, temp) -> ir.Value:
    """Page maxima; m, correction of what was summed before and factor of this page, all rows side by side."""
    b = e.b
    for r in range(block.rows):
        x = _row_scores(e, temp, r)
        e.store(temp, block.tops + 4 * r, horizontal_max(e, vmax(e, vmax(e, x[0], x[1]), vmax(e, x[2], x[3]))), 4)
    tops, old = e.load(temp, block.tops, wide, 4), e.load(state, block.m, wide, 4)
    new = vmax(e, tops, old)
    e.store(state, block.m, new, 4)
    e.store(temp, block.correction, exp2(e, b.fsub(old, new)), 4)
    seen = b.fcmp_ordered(">", tops, fill(HIDDEN / 2, f32, LANES))
    factor = b.select(seen, exp2(e, b.fsub(tops, new)), fill(0.0, f32, LANES))
    e.store(temp, block.factor, factor, 4)
    return factor


def _row_weights(e: Emit, block: Block, state, temp, row: int) -> list:
    """exp2 of the row's scores below the page's maximum; adds them to l."""
    b = e.b
    top = broadcast(e, temp, block.tops + 4 * row)
    p = [exp2(e, b.fsub(x, top)) for x in _row_scores(e, temp, row)]
    total = b.fadd(b.fadd(p[0], p[1]), b.fadd(p[2], p[3]))
    kept = b.fmul(e.load(state, block.l + 64 * row, wide, 4), broadcast(e, temp, block.correction + 4 * row))
    e.store(state, block.l + 64 * row, e.fma(total, broadcast(e, temp, block.factor + 4 * row), kept), 4)
    return p


def _largest(e: Emit, scales: list) -> ir.Value:
    """Of 64 value scales, at least 1e-30."""
    largest = horizontal_max(e, vmax(e, vmax(e, scales[0], scales[1]), vmax(e, scales[2], scales[3])))
    least = ir.Constant(f32, 1e-30)
    return e.b.fadd(e.b.select(e.b.fcmp_ordered(">", largest, least), largest, least), nan_of(e, scales))


def page_weights(e: Emit, block: Block, scales: list, factor, state, temp, visible: Visible, prefetch) -> None:
    """Codes of the page's int8 weights from the scores, the value scales and the rows' factors."""
    b = e.b
    if visible.mode != "rows":
        if visible.mode == "tokens":
            scales = _seen_scales(e, scales, visible.count(e, block, state, 0))
        largest = _largest(e, scales)
        unit = e.splat(b.fmul(largest, ir.Constant(f32, 1 / WEIGHT)), LANES)
        steps = e.splat(b.fdiv(ir.Constant(f32, WEIGHT), largest), LANES)
        scales = [b.fmul(s, steps) for s in scales]
        e.store(temp, block.factor + 64, b.fmul(factor, unit), 4)
    pairs, low_byte = fill(0x007F007F, i32, LANES), fill(0x3FFF, i32, LANES)
    shift = lambda n: fill(n, i32, LANES)
    for r in range(block.rows):
        p = _row_weights(e, block, state, temp, r)
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
        prefetch.some()


def _seen_scales(e: Emit, scales: list, count) -> list:
    return [e.b.select(e.b.icmp_signed("<", token_of(e, c), count), scale, fill(0.0, f32, LANES))
            for c, scale in enumerate(scales)]


def _weights_fp16(e: Emit, block: Block, state, temp) -> None:
    page_maximum(e, block, state, temp)
    for r in range(block.rows):
        for c, p in enumerate(_row_weights(e, block, state, temp, r)):
            e.store(temp, 256 * r + 64 * c, p, 4)


def _values_int8(e: Emit, block: Block, page, following, state, temp) -> None:
    b, lay = e.b, block.layout
    budget = _accumulators(e)
    many = min(block.rows, budget // 2)
    lanes = _divisor(lay.padded // LANES, budget // (2 * many))
    unroll = 2 if budget == 16 else 1
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(lay.padded // LANES // lanes)) as outer:
            dims = b.mul(outer.index, c64(64 * lanes))
            zero = [fill(0, i32, LANES)] * (2 * len(rows))
            with e.loop(c64(LANES), zero * lanes, step=unroll) as inner:
                acc = list(inner.state)
                for u in range(unroll):
                    step = b.add(inner.index, c64(u))
                    weights_at = e.at(temp, b.mul(step, c64(4)))
                    w = [broadcast(e, weights_at, part + 64 * r, i32)
                         for r in rows for part in (block.high_weights, block.low_weights)]
                    for d in range(lanes):
                        at = b.add(b.add(dims, c64(lay.v_at + 64 * d)), b.mul(step, c64(4 * lay.padded)))
                        values = e.load(page, at, bytes64)
                        if start == 0:
                            prefetch_line(e, following, lay.bytes, at)
                        for k, codes in enumerate(w):
                            acc[d * len(w) + k] = e.dot(acc[d * len(w) + k], codes, values, 127)
                inner.next = acc
            for d in range(lanes):
                for k, r in enumerate(rows):
                    high, low = inner.result[d * len(zero) + 2 * k:d * len(zero) + 2 * k + 2]
                    sums = e.to_float(b.add(b.shl(high, fill(7, i32, LANES)), low))
                    add_output(e, block, state, temp, r, b.add(dims, c64(64 * d)), sums, 64)


def add_output(e: Emit, block: Block, state, temp, row: int, at, sums, factor: int) -> None:
    at = e.b.add(at, c64(block.o + 4 * block.layout.padded * row))
    kept = e.b.fmul(e.load(state, at, wide, 4), broadcast(e, temp, block.correction + 4 * row))
    e.store(state, at, e.fma(sums, broadcast(e, temp, block.factor + factor + 4 * row), kept), 4)


def _values_fp16(e: Emit, block: Block, page, following, state, temp, tokens) -> None:
    b, lay = e.b, block.layout
    budget = _accumulators(e)
    many = min(block.rows, budget)
    lanes = _divisor(lay.padded // LANES, budget // many)
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(lay.padded // LANES // lanes)) as outer:
            dims = b.mul(outer.index, c64(LANES * lanes))
            with e.loop(tokens, [fill(0.0, f32, LANES)] * (len(rows) * lanes)) as inner:
                acc, t = list(inner.state), inner.index
                slot = b.add(b.mul(b.and_(t, c64(3)), c64(64)), b.mul(b.lshr(t, c64(2)), c64(4)))
                w = [broadcast(e, e.at(temp, slot), 256 * r) for r in rows]
                for d in range(lanes):
                    at = b.add(b.mul(b.add(dims, c64(LANES * d)), c64(2)),
                               b.add(b.mul(t, c64(2 * lay.padded)), c64(lay.v_at)))
                    values = e.half_to_float(e.load(page, at, vec(f16, LANES)))
                    if start == 0 and d % 2 == 0:
                        prefetch_line(e, following, lay.bytes, at)
                    for k, weight in enumerate(w):
                        acc[d * len(w) + k] = e.fma(values, weight, acc[d * len(w) + k])
                inner.next = acc
            for d in range(lanes):
                for k, r in enumerate(rows):
                    add_output(e, block, state, temp, r, b.mul(b.add(dims, c64(LANES * d)), c64(4)),
                                inner.result[d * len(rows) + k], 0)
