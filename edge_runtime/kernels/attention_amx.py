"""Attention over one page with bf16 matrix tiles: what prefill is made of on processors that have them.

A block is 16 query rows, one tile high. A page is unpacked to bf16 tiles once for all blocks of a task; its token
scales are applied to scores and weights in float32, so that int8 codes enter the products exactly.

    int8 KV   one product of bf16 queries with keys, one of bf16 weights with values
    fp16 KV   halves, queries and weights are split into two bf16 each (exact for halves), and the three larger of the
              four products are summed: 16 bits

Where a tile spans tokens it follows the record: scores of column c (tokens 4 i + c) are one tile; the weights of two
columns lie in pairs beside each other, as do the values that they meet.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from llvmlite import ir

from edge_runtime.kernels.attention_block import HIDDEN
from edge_runtime.kernels.attention_math import exp2, load_padded, log2, store_part, vmax
from edge_runtime.kernels.kv_record import COLUMNS, RecordLayout
from edge_runtime.kernels.vector_ir import LANES, Emit, c64, f16, f32, fill, i8, i16, i32, ints, vec, wide

ROWS = 16  # of a tile
TILE = 1024  # bytes of a tile, rows 64 bytes apart
SLACK = 8.0  # the maximum stays until a score exceeds it by this (base 2): weights stay below 256, corrections rare
HIGH = -65536  # the half of a float32 that is a bf16


@dataclass(frozen=True)
class Tiles:
    """Byte offsets in a thread's scratch memory, and inside a block's state (from `blocks` on, `size` bytes each)."""

    layout: RecordLayout

    @property
    def terms(self) -> int:
        """bf16 terms that a value is split into."""
        return 1 if self.layout.int8 else 2

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(term of queries or weights, term of keys or values), smallest first."""
        return ((0, 0),) if self.layout.int8 else ((1, 0), (0, 1), (0, 0))

    @property
    def chunks(self) -> int:
        """Tiles of 32 dimensions that a query takes."""
        return -(-self.layout.padded // 32)

    @property
    def lanes(self) -> int:
        """Tiles of 16 dimensions that a value takes."""
        return self.layout.padded // LANES

    @property
    def keys_size(self) -> int:
        return COLUMNS * self.chunks * TILE

    @property
    def values_size(self) -> int:
        return self.lanes * 2 * TILE

    @property
    def keys(self) -> int:
        return 64  # after the tile configuration

    @property
    def values(self) -> int:
        return self.keys + self.terms * self.keys_size

    @property
    def scores(self) -> int:
        return self.values + self.terms * self.values_size

    @property
    def turn(self) -> int:
        """Scores and weights lie there twice: the matrix unit works on one block's while vectors work on another's."""
        return (COLUMNS + self.terms * 2) * TILE

    @property
    def weights(self) -> int:
        return self.scores + COLUMNS * TILE

    @property
    def scales(self) -> int:
        """Value scales of the page's written tokens, zero for others."""
        return self.scores + 2 * self.turn

    @property
    def shift(self) -> int:
        """Minus the rows' maxima."""
        return self.scales + 256

    @property
    def correction(self) -> int:
        return self.shift + 64

    @property
    def blocks(self) -> int:
        return self.correction + 64

    # a block's state: queries, then
    @property
    def o(self) -> int:
        return self.terms * self.chunks * TILE

    @property
    def l(self) -> int:  # noqa: E743
        return self.o + self.lanes * TILE

    @property
    def m(self) -> int:
        return self.l + ROWS * 64

    @property
    def limit(self) -> int:
        return self.m + 64

    @property
    def size(self) -> int:
        return self.limit + 64


def _tile(number: int) -> ir.Constant:
    return ir.Constant(i8, number)


def _load(e: Emit, tile: int, address, offset) -> None:
    e.call("llvm.x86.tileloadd64", ir.VoidType(), [_tile(tile), e.pointer(e.at(address, offset), i8), c64(64)])


def _store(e: Emit, tile: int, address, offset) -> None:
    e.call("llvm.x86.tilestored64", ir.VoidType(), [_tile(tile), e.pointer(e.at(address, offset), i8), c64(64)])


def _product(e: Emit, target: int, a: int, b: int) -> None:
    e.call("llvm.x86.tdpbf16ps", ir.VoidType(), [_tile(target), _tile(a), _tile(b)])


def configure(e: Emit, tiles: Tiles, scratch) -> None:
    """Eight tiles of 16 rows x 64 bytes; keys' tiles start as zeros, which is what their padding stays."""
    e.call("llvm.memset.p0.i64", ir.VoidType(), [
        e.pointer(scratch, i8), ir.Constant(i8, 0), c64(tiles.blocks), ir.Constant(ir.IntType(1), 0)])
    e.store(scratch, 0, ir.Constant(i8, 1))
    for tile in range(8):
        e.store(scratch, 16 + 2 * tile, ir.Constant(i16, 64))
        e.store(scratch, 48 + tile, ir.Constant(i8, ROWS))
    e.call("llvm.x86.ldtilecfg", ir.VoidType(), [e.pointer(scratch, i8)])


def release(e: Emit) -> None:
    e.call("llvm.x86.tilerelease", ir.VoidType(), [])


def clear_block(e: Emit, tiles: Tiles, state) -> None:
    e.call("llvm.memset.p0.i64", ir.VoidType(), [
        e.pointer(state, i8), ir.Constant(i8, 0), c64(tiles.size), ir.Constant(ir.IntType(1), 0)])
    e.store(state, tiles.m, fill(HIDDEN, f32, LANES))


def _bits(e: Emit, x):
    return e.b.bitcast(x, ints)


def _split(e: Emit, x, terms: int) -> list:
    """Bits of float32 values whose upper halves are bf16 and sum to x."""
    b, high = e.b, fill(HIGH, i32, LANES)
    parts = []
    for k in range(terms):
        if k == terms - 1:
            parts.append(b.add(_bits(e, x), fill(0x8000, i32, LANES)))  # rounded; the lower half is dropped
        else:
            kept = b.and_(_bits(e, x), high)
            parts.append(kept)
            x = b.fsub(x, b.bitcast(kept, wide))
    return parts


def _pair(e: Emit, low, high):
    """bf16 of two vectors, element beside element."""
    b = e.b
    return b.or_(b.lshr(low, fill(16, i32, LANES)), b.and_(high, fill(HIGH, i32, LANES)))


def start_row(e: Emit, tiles: Tiles, state, row, query) -> None:
    """Takes float32 query [D] as row `row` of a block that was cleared."""
    b, size = e.b, tiles.layout.head_size
    factor = fill(math.log2(math.e) / math.sqrt(size), f32, LANES)
    at = e.at(state, b.mul(row, c64(64)))
    for d in range(0, size, LANES):
        parts = _split(e, b.fmul(load_padded(e, query, d, size), factor), tiles.terms)
        for k, part in enumerate(parts):
            halves = b.trunc(b.lshr(part, fill(16, i32, LANES)), vec(i16, LANES))
            e.store(at, (k * tiles.chunks + d // 32) * TILE + (d % 32) * 2, halves)


def unpack_page(e: Emit, tiles: Tiles, page, following, scratch, tokens) -> None:
    """A record to bf16 tiles. `tokens` of it are written; `following` is prefetched."""
    if tiles.layout.int8:
        _unpack_int8(e, tiles, page, following, scratch, tokens)
    else:
        _unpack_fp16(e, tiles, page, following, scratch, tokens)


def _unpack_int8(e: Emit, tiles: Tiles, page, following, scratch, tokens) -> None:
    b, lay = e.b, tiles.layout

    def rows(words):
        """[16][4] codes to two rows of [16][2] bf16."""
        f = [_bits(e, e.to_float(b.ashr(b.shl(words, fill(24 - 8 * k, i32, LANES)) if k < 3 else words,
                                        fill(24, i32, LANES)))) for k in range(4)]
        return _pair(e, f[0], f[1]), _pair(e, f[2], f[3])

    groups = lay.padded // 4
    for c in range(COLUMNS):
        with e.loop(c64(groups)) as loop:
            source = b.add(b.mul(loop.index, c64(64)), c64(c * lay.column_bytes))
            e.prefetch(following, source, 2)
            target = e.at(scratch, b.add(b.mul(loop.index, c64(128)), c64(tiles.keys + c * tiles.chunks * TILE)))
            for k, row in enumerate(rows(e.load(page, source, ints))):
                e.store(target, 64 * k, row)
    with e.loop(c64(LANES)) as loop:
        source = b.add(b.mul(loop.index, c64(4 * lay.padded)), c64(lay.v_at))
        target = e.at(scratch, b.add(b.mul(loop.index, c64(64)), c64(tiles.values)))
        for n in range(tiles.lanes):
            e.prefetch(following, b.add(source, c64(64 * n)), 2)
            for k, row in enumerate(rows(e.load(page, b.add(source, c64(64 * n)), ints))):
                e.store(target, (2 * n + k) * TILE, row)
    count = e.splat(b.trunc(tokens, i32), LANES)
    for c in range(COLUMNS):
        e.prefetch(following, lay.k_scale_at + 64 * c, 2)
        e.prefetch(following, lay.v_scale_at + 64 * c, 2)
        written = b.icmp_signed("<", ir.Constant(ints, [COLUMNS * i + c for i in range(LANES)]), count)
        scale = e.load(page, lay.v_scale_at + 64 * c, wide, 4)
        e.store(scratch, tiles.scales + 64 * c, b.select(written, scale, fill(0.0, f32, LANES)))


def _unpack_fp16(e: Emit, tiles: Tiles, page, following, scratch, tokens) -> None:
    b, lay = e.b, tiles.layout
    halves = vec(f16, LANES)
    for c in range(COLUMNS):
        with e.loop(c64(lay.padded // 2)) as loop:
            source = b.add(b.mul(loop.index, c64(64)), c64(c * lay.column_bytes))
            e.prefetch(following, source, 2)
            pair = [_split(e, e.half_to_float(e.load(page, b.add(source, c64(32 * k)), halves)), 2) for k in range(2)]
            target = e.at(scratch, b.add(b.mul(loop.index, c64(64)), c64(tiles.keys + c * tiles.chunks * TILE)))
            for term in range(2):
                e.store(target, term * tiles.keys_size, _pair(e, pair[0][term], pair[1][term]))
    with e.loop(c64(LANES)) as loop:
        source = b.add(b.mul(loop.index, c64(8 * lay.padded)), c64(lay.v_at))
        target = e.at(scratch, b.add(b.mul(loop.index, c64(64)), c64(tiles.values)))
        for n in range(tiles.lanes):
            parts = []
            for k in range(4):
                at = b.add(source, c64(2 * lay.padded * k + 32 * n))
                if n % 2 == 0:
                    e.prefetch(following, at, 2)
                written = b.icmp_signed("<", b.add(b.mul(loop.index, c64(4)), c64(k)), tokens)
                value = b.select(written, e.load(page, at, halves), fill(0.0, f16, LANES))
                parts.append(_split(e, e.half_to_float(value), 2))
            for h in range(2):
                for term in range(2):
                    e.store(target, term * tiles.values_size + (2 * n + h) * TILE,
                            _pair(e, parts[2 * h][term], parts[2 * h + 1][term]))


def start_page(e: Emit, tiles: Tiles, scratch, state, turn) -> None:
    """Scores of the page's first block."""
    advance(_scores(e, tiles, scratch, state, turn), None)


def page_step(e: Emit, tiles: Tiles, page, scratch, states, turns, first, masked: bool) -> None:
    """Softmax of one block's scores, while the matrix unit adds the values of the block before and multiplies the
    queries of the next with the keys.

    states: the block before, this one, the next; turns: offsets of this turn's scores and weights, and of the other's.
    first: index of the page's first token; masked: some row of the block does not see the whole page."""
    before, state, after = states
    here, there = turns
    _softmax(e, tiles, page, scratch, state, first, masked, here, _values(e, tiles, scratch, before, there),
             _scores(e, tiles, scratch, after, there))


def end_page(e: Emit, tiles: Tiles, scratch, state, turn) -> None:
    """Adds the values of the page's last block."""
    advance(_values(e, tiles, scratch, state, turn), None)


def _scores(e: Emit, tiles: Tiles, scratch, state, turn) -> Iterator[None]:
    """Yields after every product, so that other code can stand between them."""
    for c in range(COLUMNS):
        e.call("llvm.x86.tilezero", ir.VoidType(), [_tile(c)])
    a = 4
    for query, key in tiles.products:
        for chunk in range(tiles.chunks):
            a = 9 - a
            _load(e, a, state, (query * tiles.chunks + chunk) * TILE)
            for c in range(COLUMNS):
                at = tiles.keys + key * tiles.keys_size + (c * tiles.chunks + chunk) * TILE
                _load(e, 6 + c % 2, scratch, at)
                _product(e, c, a, 6 + c % 2)
                yield
    here = e.at(scratch, turn)
    for c in range(COLUMNS):
        _store(e, c, here, tiles.scores + c * TILE)


def _values(e: Emit, tiles: Tiles, scratch, state, turn) -> Iterator[None]:
    here, a = e.at(scratch, turn), 4
    for start in range(0, tiles.lanes, 4):
        lanes = range(start, min(tiles.lanes, start + 4))
        for n in lanes:
            _load(e, n - start, state, tiles.o + n * TILE)
        for weight, value in tiles.products:
            for h in range(2):
                a = 9 - a
                _load(e, a, here, tiles.weights + (2 * weight + h) * TILE)
                for n in lanes:
                    _load(e, 6 + n % 2, scratch, tiles.values + value * tiles.values_size + (2 * n + h) * TILE)
                    _product(e, n - start, a, 6 + n % 2)
                    yield
        for n in lanes:
            _store(e, n - start, state, tiles.o + n * TILE)


def advance(code: Iterator, steps: int | None) -> None:
    """Emits the next `steps` steps of interleaved code, or what is left of it."""
    for _ in islice(code, steps):
        pass


def _row_maxima(e: Emit, rows: list):
    """Maxima of 16 vectors, side by side."""
    width = LANES // 2  # lanes that a vector still needs
    while len(rows) > 1:
        # Each step halves what a row takes and puts two rows into one vector.
        low = [i for base in range(0, LANES, 2 * width) for i in range(base, base + width)]
        high = [i + width for i in low]
        half = len(rows) // 2
        merged = []
        for k in range(half):
            x, y = rows[k], rows[k + half]
            order_low, order_high = [], []
            for base in range(0, LANES, 2 * width):
                order_low += [*range(base, base + width), *range(LANES + base, LANES + base + width)]
                order_high += [*range(base + width, base + 2 * width),
                               *range(LANES + base + width, LANES + base + 2 * width)]
            merged.append(vmax(e, e.shuffle(x, y, order_low), e.shuffle(x, y, order_high)))
        assert len(low) == len(high) == LANES // 2
        rows, width = merged, width // 2
    return rows[0]


def _softmax(e: Emit, tiles: Tiles, page, scratch, state, first, masked: bool, turn, values_before: Iterator,
             scores_after: Iterator) -> None:
    b, lay = e.b, tiles.layout
    here = e.at(scratch, turn)
    products = len(tiles.products)
    pace_values = -(-tiles.lanes * 2 * products // ROWS)
    pace_scores = -(-tiles.chunks * COLUMNS * products // ROWS)
    at = lambda c, r: tiles.scores + c * TILE + 64 * r
    scales = [e.load(page, lay.k_scale_at + 64 * c, wide, 4) for c in range(COLUMNS)] if lay.int8 else None

    def seen(r: int, c: int):
        limit = e.splat(b.sub(e.load(state, tiles.limit + 4 * r, i32, 4), b.trunc(first, i32)), LANES)
        return b.icmp_signed("<", ir.Constant(ints, [COLUMNS * i + c for i in range(LANES)]), limit)

    hidden = fill(HIDDEN, f32, LANES)
    tops = []
    for r in range(ROWS):
        x = [e.load(here, at(c, r), wide, 4) for c in range(COLUMNS)]
        if scales is not None:
            x = [b.fmul(value, scale) for value, scale in zip(x, scales)]
        if masked:
            x = [b.select(seen(r, c), value, hidden) for c, value in enumerate(x)]
        tops.append(vmax(e, vmax(e, x[0], x[1]), vmax(e, x[2], x[3])))
        advance(values_before, pace_values)
    advance(values_before, None)
    top = _row_maxima(e, tops)
    old = e.load(state, tiles.m, wide, 4)
    higher = b.fcmp_ordered(">", top, b.fadd(old, fill(SLACK, f32, LANES)))
    new = b.select(higher, top, old)
    e.store(scratch, tiles.shift, b.fsub(fill(0.0, f32, LANES), new), 4)
    with b.if_then(b.icmp_unsigned("!=", b.bitcast(higher, i16), ir.Constant(i16, 0))):
        e.store(state, tiles.m, new, 4)
        e.store(scratch, tiles.correction, exp2(e, b.fsub(old, new)), 4)
        with e.loop(c64(ROWS)) as loop:
            factor = e.splat(e.load(scratch, b.add(b.mul(loop.index, c64(4)), c64(tiles.correction)), f32, 4), LANES)
            row = e.at(state, b.mul(loop.index, c64(64)))
            for offset in (tiles.l, *(tiles.o + n * TILE for n in range(tiles.lanes))):
                e.store(row, offset, b.fmul(e.load(row, offset, wide, 4), factor), 4)
    values = [e.load(scratch, tiles.scales + 64 * c, wide, 4) for c in range(COLUMNS)]
    for r in range(ROWS):
        shift = e.splat(e.load(scratch, tiles.shift + 4 * r, f32, 4), LANES)
        x = [e.load(here, at(c, r), wide, 4) for c in range(COLUMNS)]
        if scales is not None:
            x = [e.fma(value, scale, shift) for value, scale in zip(x, scales)]
        else:
            x = [b.fadd(value, shift) for value in x]
        if masked:
            x = [b.select(seen(r, c), value, hidden) for c, value in enumerate(x)]
        p = [exp2(e, value, 4 if lay.int8 else 5) for value in x]
        total = b.fadd(b.fadd(p[0], p[1]), b.fadd(p[2], p[3]))
        e.store(state, tiles.l + 64 * r, b.fadd(e.load(state, tiles.l + 64 * r, wide, 4), total), 4)
        if lay.int8:
            p = [b.fmul(weight, scale) for weight, scale in zip(p, values)]
        parts = [_split(e, weight, tiles.terms) for weight in p]
        for h in range(2):
            for term in range(tiles.terms):
                e.store(here, tiles.weights + (2 * term + h) * TILE + 64 * r,
                        _pair(e, parts[2 * h][term], parts[2 * h + 1][term]), 4)
        advance(scores_after, pace_scores)
    advance(scores_after, None)


def finish_row(e: Emit, tiles: Tiles, state, row, out, lse) -> None:
    """out float32 [D] = o / l; lse, natural logarithm, where its address is not 0."""
    b, size = e.b, tiles.layout.head_size
    at = e.at(state, b.mul(row, c64(64)))
    total = e.reduce_add(e.load(at, tiles.l, wide, 4))
    inverse = e.splat(b.fdiv(ir.Constant(f32, 1.0), total), LANES)
    for n in range(tiles.lanes):
        store_part(e, out, LANES * n, size, b.fmul(e.load(at, tiles.o + n * TILE, wide, 4), inverse))
    with b.if_then(b.icmp_signed("!=", lse, c64(0))):
        top = e.load(state, b.add(b.mul(row, c64(4)), c64(tiles.m)), f32, 4)
        e.store(lse, 0, b.fmul(b.fadd(top, log2(e, total)), ir.Constant(f32, math.log(2))), 4)
