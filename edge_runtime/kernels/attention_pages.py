"""Attention over one page with vectors: what decode, and prefill without matrix tiles, are made of.

A block is up to 8 query rows (the heads of a group, or rows of a prompt) that visit a page together; its running
state lives in scratch memory. Scores are kept in base 2: log2(e) / sqrt(D) is folded into the query.

    int8 KV   query = scale * (high + low / 254), two int8 codes: 15 bits, far finer than the keys' 8.
              weights of a page = (128 * high + low) * largest / 16383, two 7-bit codes with the tokens' value scales
              folded in: values are two integer passes as well, and small errors of a weight do not add up.
    fp16 KV   float32 products.
"""
from __future__ import annotations

from llvmlite import ir

from edge_runtime.kernels.attention_block import HIDDEN, LOW, Block
from edge_runtime.kernels.attention_math import broadcast
from edge_runtime.kernels.attention_prefetch import Prefetch
from edge_runtime.kernels.attention_softmax import Visible, float_weights, page_maximum, page_weights, token_of
from edge_runtime.kernels.kv_record import COLUMNS, TOKENS
from edge_runtime.kernels.tiles import weight_bias
from edge_runtime.kernels.vector_ir import LANES, Emit, bytes64, c64, f16, f32, fill, i8, i32, vec, wide


def _divisor(count: int, limit: int) -> int:
    return max(d for d in range(1, max(1, limit) + 1) if count % d == 0)


class _Shape:
    """How the loops are blocked. many: rows at a time; columns: of scores; lanes: of 16 dimensions of the output;
    unroll: steps of a turn."""

    def __init__(self, e: Emit, block: Block):
        budget = 16 if e.isa.dot == "vnni512" else 4  # vectors of 16 lanes that stay in registers
        codes = 2 if block.layout.int8 else 1
        self.many = min(block.rows, budget // codes)
        self.columns = _divisor(COLUMNS, budget // (codes * self.many))
        self.lanes = _divisor(block.layout.padded // LANES, budget // (codes * self.many))
        self.unroll = 2 if budget == 16 else 1


def page_step(e: Emit, block: Block, page: ir.Value, following: ir.Value, state: ir.Value, temp: ir.Value,
              visible: Visible) -> None:
    """One page of the block's attention. page, following: addresses of this record and of one to prefetch."""
    prefetch = _prefetch(e, block, following)
    if block.layout.int8:
        _scores_int8(e, block, page, state, temp, visible, prefetch)
        scales = [e.load(page, block.layout.v_scale_at + 64 * c, wide, 4) for c in range(COLUMNS)]
        page_weights(e, block, scales, page_maximum(e, block, state, temp), state, temp, visible, prefetch)
        _values_int8(e, block, page, state, temp, prefetch)
    else:
        _scores_fp16(e, block, page, state, temp, visible, prefetch)
        float_weights(e, block, page_maximum(e, block, state, temp), state, temp, prefetch)
        _values_fp16(e, block, page, state, temp, visible.tokens, prefetch)


def _prefetch(e: Emit, block: Block, address: ir.Value) -> Prefetch:
    lay, shape = block.layout, _Shape(e, block)
    columns, lanes = COLUMNS // shape.columns, lay.padded // LANES // shape.lanes
    if lay.int8:
        turns = columns * (lay.padded // 4) // shape.unroll, lanes * LANES // shape.unroll
    else:
        turns = columns * lay.padded // 2, lanes * TOKENS
    return Prefetch(e, address, lay.bytes, turns[0], block.rows, turns[1])


def _store_scores(e: Emit, block: Block, state, temp, visible: Visible, row: int, column, x) -> None:
    """Hides the tokens that the row does not see."""
    b = e.b
    if visible.mode != "all":
        seen = b.icmp_signed("<", token_of(e, column), visible.count(e, block, state, row))
        x = b.select(seen, x, fill(HIDDEN, f32, LANES))
    e.store(temp, b.add(b.mul(column, c64(64)), c64(256 * row)), x, 4)


def _scores_int8(e: Emit, block: Block, page, state, temp, visible: Visible, prefetch: Prefetch) -> None:
    b, lay = e.b, block.layout
    shape = _Shape(e, block)
    many, columns, unroll = shape.many, shape.columns, shape.unroll
    flip = fill(-128, i8, 64) if weight_bias(e.isa) else None
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(COLUMNS // columns)) as outer:
            column = b.mul(outer.index, c64(columns))
            keys_at = b.mul(column, c64(lay.column_bytes))
            zero = [broadcast(e, state, offset + 4 * r, i32) for r in rows for offset in (block.sums, block.low_sums)]
            with e.loop(c64(lay.padded // 4), zero * columns, step=unroll) as inner:
                acc = list(inner.state)
                if start == 0:
                    prefetch.scores(_turn(e, outer, inner, lay.padded // 4, unroll))
                for u in range(unroll):
                    step = b.add(inner.index, c64(u))
                    query = e.at(state, b.mul(step, c64(4)))
                    q = [broadcast(e, query, part + r * block.row_bytes, i32) for r in rows for part in (0, block.low)]
                    for c in range(columns):
                        at = b.add(b.add(keys_at, c64(c * lay.column_bytes)), b.mul(step, c64(64)))
                        keys = e.load(page, at, bytes64)
                        if flip is not None:
                            keys = b.xor(keys, flip)
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


def _scores_fp16(e: Emit, block: Block, page, state, temp, visible: Visible, prefetch: Prefetch) -> None:
    b, lay = e.b, block.layout
    shape = _Shape(e, block)
    many, columns = shape.many, shape.columns
    halves = vec(f16, LANES)
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(COLUMNS // columns)) as outer:
            column = b.mul(outer.index, c64(columns))
            keys_at = b.mul(column, c64(lay.column_bytes))
            with e.loop(c64(lay.padded), [fill(0.0, f32, LANES)] * (columns * len(rows)), step=2) as inner:
                acc = list(inner.state)
                if start == 0:
                    prefetch.scores(_turn(e, outer, inner, lay.padded, 2))
                for u in range(2):
                    step = b.add(inner.index, c64(u))
                    query = e.at(state, b.mul(step, c64(4)))
                    q = [broadcast(e, query, r * block.row_bytes) for r in rows]
                    for c in range(columns):
                        at = b.add(b.add(keys_at, c64(c * lay.column_bytes)), b.mul(step, c64(32)))
                        keys = e.half_to_float(e.load(page, at, halves))
                        for k, value in enumerate(q):
                            acc[c * len(q) + k] = e.fma(keys, value, acc[c * len(q) + k])
                inner.next = acc
            for c in range(columns):
                for k, r in enumerate(rows):
                    _store_scores(e, block, state, temp, visible, r, b.add(column, c64(c)),
                                  inner.result[c * len(rows) + k])


def _turn(e: Emit, outer, inner, inners: int, step: int) -> ir.Value:
    """Turns of two nested loops, counted through."""
    return e.b.udiv(e.b.add(e.b.mul(outer.index, c64(inners)), inner.index), c64(step))


def _values_int8(e: Emit, block: Block, page, state, temp, prefetch: Prefetch) -> None:
    b, lay = e.b, block.layout
    shape = _Shape(e, block)
    many, lanes, unroll = shape.many, shape.lanes, shape.unroll
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(lay.padded // LANES // lanes)) as outer:
            dims = b.mul(outer.index, c64(64 * lanes))
            zero = [fill(0, i32, LANES)] * (2 * len(rows))
            with e.loop(c64(LANES), zero * lanes, step=unroll) as inner:
                acc = list(inner.state)
                if start == 0:
                    prefetch.values(_turn(e, outer, inner, LANES, unroll))
                for u in range(unroll):
                    step = b.add(inner.index, c64(u))
                    weights_at = e.at(temp, b.mul(step, c64(4)))
                    w = [broadcast(e, weights_at, part + 64 * r, i32)
                         for r in rows for part in (block.high_weights, block.low_weights)]
                    for d in range(lanes):
                        at = b.add(b.add(dims, c64(lay.v_at + 64 * d)), b.mul(step, c64(4 * lay.padded)))
                        values = e.load(page, at, bytes64)
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


def _values_fp16(e: Emit, block: Block, page, state, temp, tokens, prefetch: Prefetch) -> None:
    b, lay = e.b, block.layout
    shape = _Shape(e, block)
    many, lanes = shape.many, shape.lanes
    for start in range(0, block.rows, many):
        rows = range(start, min(block.rows, start + many))
        with e.loop(c64(lay.padded // LANES // lanes)) as outer:
            dims = b.mul(outer.index, c64(LANES * lanes))
            with e.loop(tokens, [fill(0.0, f32, LANES)] * (len(rows) * lanes)) as inner:
                acc, t = list(inner.state), inner.index
                if start == 0:
                    prefetch.values(_turn(e, outer, inner, TOKENS, 1))
                slot = b.add(b.mul(b.and_(t, c64(3)), c64(64)), b.mul(b.lshr(t, c64(2)), c64(4)))
                w = [broadcast(e, e.at(temp, slot), 256 * r) for r in rows]
                for d in range(lanes):
                    at = b.add(b.mul(b.add(dims, c64(LANES * d)), c64(2)),
                               b.add(b.mul(t, c64(2 * lay.padded)), c64(lay.v_at)))
                    values = e.half_to_float(e.load(page, at, vec(f16, LANES)))
                    for k, weight in enumerate(w):
                        acc[d * len(w) + k] = e.fma(values, weight, acc[d * len(w) + k])
                inner.next = acc
            for d in range(lanes):
                for k, r in enumerate(rows):
                    add_output(e, block, state, temp, r, b.mul(b.add(dims, c64(LANES * d)), c64(4)),
                                inner.result[d * len(rows) + k], 0)
