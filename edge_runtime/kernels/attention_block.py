"""A block of up to 8 query rows that visit pages together: its state, how rows enter it, and how their results leave.

Results of pieces of a sequence are merged by log-sum-exp.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

from llvmlite import ir

from edge_runtime.kernels.attention_math import exp2, horizontal_max, load_padded, log2, nan_of, store_part, vmax
from edge_runtime.kernels.kv_record import RecordLayout
from edge_runtime.kernels.tiles import weight_bias
from edge_runtime.kernels.vector_ir import LANES, Emit, c64, f32, fill, i8, i32, ints, vec, wide

MAX_ROWS = 8  # rows of a block: 16 accumulators with two codes per query value
HIDDEN = -1e30  # score of a token that a row does not see
LOW = 254.0  # steps of the query's low code in one of the high code


def block_rows(rows: int) -> int:
    """Rows per block when `rows` rows visit every page together."""
    blocks = -(-rows // MAX_ROWS)
    return -(-rows // blocks)


@dataclass(frozen=True)
class Block:
    """Byte offsets of a block's state: query codes (or floats), then per row sums of codes (times -128), query scale,
    tokens visible (int32), maximum m, sum l (16 lanes), unnormalized output o. Then what a page leaves behind.

    `size` is the state's, `temp_size` that of the page's scores, weights and factors, which blocks share."""

    layout: RecordLayout
    rows: int

    @property
    def row_bytes(self) -> int:
        """One row of query codes, or of query floats."""
        return self.layout.padded * (1 if self.layout.int8 else 4)

    @property
    def low(self) -> int:
        return self.rows * self.row_bytes

    @property
    def sums(self) -> int:
        return -(-self.low * 2 // 64) * 64

    @property
    def low_sums(self) -> int:
        return self.sums + 64

    @property
    def scale(self) -> int:
        return self.sums + 128

    @property
    def limit(self) -> int:
        return self.sums + 192

    @property
    def m(self) -> int:
        return self.sums + 256

    @property
    def l(self) -> int:  # noqa: E743
        return self.sums + 320

    @property
    def o(self) -> int:
        return self.l + 64 * self.rows

    @property
    def size(self) -> int:
        return self.o + 4 * self.rows * self.layout.padded

    # temporary
    @property
    def high_weights(self) -> int:
        return 256 * self.rows

    @property
    def low_weights(self) -> int:
        return self.high_weights + 64 * self.rows

    @property
    def tops(self) -> int:
        return self.low_weights + 64 * self.rows

    @property
    def correction(self) -> int:
        return self.tops + 64

    @property
    def factor(self) -> int:
        return self.tops + 128

    @property
    def ints(self) -> int:
        """Accumulators of matrix tiles: 4 of `2 * rows` rows."""
        return self.tops + 256

    @property
    def temp_size(self) -> int:
        return self.ints + 512 * self.rows


def start_row(e: Emit, block: Block, state: ir.Value, row: ir.Value, query: ir.Value) -> None:
    """Takes float32 query [D] at `query` as row `row` of the block at `state` (zeroed before, see `clear_block`)."""
    b, size = e.b, block.layout.head_size
    factor = math.log2(math.e) / math.sqrt(size)
    q = [b.fmul(load_padded(e, query, d, size), fill(factor, f32, LANES)) for d in range(0, size, LANES)]
    at = e.at(state, b.mul(row, c64(block.row_bytes)))
    if not block.layout.int8:
        for i, part in enumerate(q):
            e.store(at, 64 * i, part, 4)
        return
    top = e.absolute(q[0])
    for part in q[1:]:
        top = vmax(e, e.absolute(part), top)
    largest = horizontal_max(e, top)
    largest = b.select(b.fcmp_ordered(">", largest, ir.Constant(f32, 1e-30)), largest, ir.Constant(f32, 1e-30))
    inverse = e.splat(b.fdiv(ir.Constant(f32, 127.0), largest), LANES)
    sums = [fill(0, i32, LANES), fill(0, i32, LANES)]
    narrow = vec(i8, LANES)
    for i, part in enumerate(q):
        x = b.fmul(part, inverse)
        high = e.call("llvm.rint.v16f32", wide, [x])
        low = b.fmul(b.fsub(x, high), fill(LOW, f32, LANES))
        codes = [b.fptosi(high, ints), e.round_to_int(low)]
        for k, offset in enumerate((0, block.low)):
            e.store(at, offset + LANES * i, b.trunc(codes[k], narrow))
            sums[k] = b.add(sums[k], codes[k])
    index = e.at(state, b.mul(row, c64(4)))
    for total, offset in zip(sums, (block.sums, block.low_sums)):
        while total.type.count > 1:
            half = total.type.count // 2
            total = b.add(e.part(total, 0, half), e.part(total, half, half))
        total = b.extract_element(total, ir.Constant(i32, 0))
        e.store(index, offset, b.mul(total, ir.Constant(i32, -weight_bias(e.isa))), 4)
    e.store(index, block.scale, b.fadd(b.fmul(largest, ir.Constant(f32, 1 / 127)), nan_of(e, q)), 4)


def clear_block(e: Emit, block: Block, state: ir.Value) -> None:
    """A block that has seen nothing; rows that are not started see nothing ever."""
    e.call("llvm.memset.p0.i64", ir.VoidType(), [
        e.pointer(state, i8), ir.Constant(i8, 0), c64(block.size), ir.Constant(ir.IntType(1), 0)])
    e.store(state, block.m, fill(HIDDEN, f32, LANES))


def _row_sum(e: Emit, block: Block, state, row) -> ir.Value:
    return e.reduce_add(e.load(state, e.b.add(e.b.mul(row, c64(64)), c64(block.l)), wide, 4))


def finish_row(e: Emit, block: Block, state, row, out, lse) -> None:
    """out float32 [D] = o / l; lse = natural logarithm of the sum of exponentials, where `lse` is not 0."""
    b, size = e.b, block.layout.head_size
    total = _row_sum(e, block, state, row)
    inverse = e.splat(b.fdiv(ir.Constant(f32, 1.0), total), LANES)
    at = e.at(state, b.add(b.mul(row, c64(4 * block.layout.padded)), c64(block.o)))
    for d in range(0, size, LANES):
        value = b.fmul(e.load(at, 4 * d, wide, 4), inverse)
        store_part(e, out, d, size, value)
    with b.if_then(b.icmp_signed("!=", lse, c64(0))):
        top = e.load(state, b.add(b.mul(row, c64(4)), c64(block.m)), f32, 4)
        e.store(lse, 0, b.fmul(b.fadd(top, log2(e, total)), ir.Constant(f32, math.log(2))), 4)


def part_floats(head_size: int) -> int:
    """Floats of one row's partial result: o [Dp], m, l, padded to a cache line."""
    return RecordLayout("int8", head_size).padded + LANES


def save_row(e: Emit, block: Block, state, row, target) -> None:
    """A row's unnormalized result: o [Dp], m, l."""
    b, size = e.b, block.layout.padded
    at = e.at(state, b.add(b.mul(row, c64(4 * size)), c64(block.o)))
    for d in range(0, size, LANES):
        e.store(target, 4 * d, e.load(at, 4 * d, wide, 4), 4)
    e.store(target, 4 * size, e.load(state, b.add(b.mul(row, c64(4)), c64(block.m)), f32, 4), 4)
    e.store(target, 4 * size + 4, _row_sum(e, block, state, row), 4)


def merge_rows(e: Emit, head_size: int, parts, count, stride, out, lse) -> None:
    """out, lse from `count` partial results `stride` bytes apart, in order: by log-sum-exp."""
    b, padded = e.b, part_floats(head_size) - LANES
    m_at = 4 * padded
    one = lambda x: e.splat(x, LANES)
    with e.loop(count, [ir.Constant(f32, HIDDEN)]) as loop:
        m = e.load(parts, b.add(b.mul(loop.index, stride), c64(m_at)), f32, 4)
        loop.next = [b.select(b.fcmp_ordered(">", m, loop.state[0]), m, loop.state[0])]
    top = loop.result[0]
    start = [fill(0.0, f32, LANES)] * (padded // LANES + 1)
    with e.loop(count, start) as loop:
        at = e.at(parts, b.mul(loop.index, stride))
        weight = exp2(e, one(b.fsub(e.load(at, m_at, f32, 4), top)))
        total = e.fma(one(e.load(at, m_at + 4, f32, 4)), weight, loop.state[-1])
        loop.next = [e.fma(e.load(at, 4 * d, wide, 4), weight, o)
                  for d, o in zip(range(0, padded, LANES), loop.state)] + [total]
    inverse = b.fdiv(fill(1.0, f32, LANES), loop.result[-1])
    for d, o in zip(range(0, head_size, LANES), loop.result):
        store_part(e, out, d, head_size, b.fmul(o, inverse))
    with b.if_then(b.icmp_signed("!=", lse, c64(0))):
        total = b.extract_element(loop.result[-1], ir.Constant(i32, 0))
        e.store(lse, 0, b.fmul(b.fadd(top, log2(e, total)), ir.Constant(f32, math.log(2))), 4)
