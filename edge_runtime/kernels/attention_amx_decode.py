"""Decode attention over int8 pages with int8 matrix tiles: records are read as tiles where they lie.

The same block, state and arithmetic as `attention_pages` (two int8 codes per query value, two 7-bit codes per weight),
so that both give the same result. The rows of a tile are the block's rows of high codes, then those of low codes: up
to 8 query heads cost no more than one.
"""
from __future__ import annotations

from llvmlite import ir

from edge_runtime.kernels.attention_block import HIDDEN, LOW, Block
from edge_runtime.kernels.attention_math import broadcast
from edge_runtime.kernels.attention_pages import add_output
from edge_runtime.kernels.attention_prefetch import Prefetch
from edge_runtime.kernels.attention_softmax import WEIGHT, Visible, page_maximum, page_weights, token_of
from edge_runtime.kernels.isa import current, host_features
from edge_runtime.kernels.kv_record import COLUMNS
from edge_runtime.kernels.vector_ir import LANES, Emit, c64, f32, fill, i8, i16, i32, ints, wide

A, A_REST, B, B_REST = 4, 5, 6, 7  # tile registers; 0-3 accumulate


def int8_tiles() -> bool:
    return current().matrix_tiles and "amx-int8" in host_features()


def configure(e: Emit, block: Block, temp) -> None:
    """Tiles for a block's rows; those that end in REST take the dimensions beyond the last multiple of 64."""
    rows, rest = 2 * block.rows, block.layout.padded // 4 % LANES or LANES
    at = e.at(temp, block.ints)
    for line in range(0, 64, 16):
        e.store(at, line, fill(0, i32, 4))
    e.store(at, 0, ir.Constant(i8, 1))
    for tile in range(8):
        e.store(at, 16 + 2 * tile, ir.Constant(i16, 4 * rest if tile == A_REST else 64))
        e.store(at, 48 + tile, ir.Constant(i8, {B: LANES, B_REST: rest}.get(tile, rows)))
    e.call("llvm.x86.ldtilecfg", ir.VoidType(), [e.pointer(at, i8)])


def _tile(number: int) -> ir.Constant:
    return ir.Constant(i8, number)


def _load(e: Emit, tile: int, address, offset, stride: int) -> None:
    e.call("llvm.x86.tileloadd64", ir.VoidType(), [_tile(tile), e.pointer(e.at(address, offset), i8), c64(stride)])


def _keep(e: Emit, tile: int, address, offset) -> None:
    e.call("llvm.x86.tilestored64", ir.VoidType(), [_tile(tile), e.pointer(e.at(address, offset), i8), c64(64)])


def page_step(e: Emit, block: Block, page, following, state, temp, visible: Visible) -> None:
    """One page of the block's attention; see `attention_pages.page_step`."""
    lanes = block.layout.padded // LANES
    prefetch = Prefetch(e, following, block.layout.bytes, block.rows, block.rows, lanes, 1 / 3)
    scales = _scores(e, block, page, state, temp, visible, prefetch)
    page_weights(e, block, scales, page_maximum(e, block, state, temp), state, temp, visible, prefetch)
    _values(e, block, page, state, temp, prefetch)


def _scores(e: Emit, block: Block, page, state, temp, visible: Visible, prefetch: Prefetch) -> list:
    """Returns the page's value scales."""
    b, lay = e.b, block.layout
    steps = lay.padded // 4
    for c in range(COLUMNS):
        e.call("llvm.x86.tilezero", ir.VoidType(), [_tile(c)])
    for first in range(0, steps, LANES):
        whole = first + LANES <= steps
        a, b_ = (A, B) if whole else (A_REST, B_REST)
        _load(e, a, state, 4 * first, block.row_bytes)
        for c in range(COLUMNS):
            _load(e, b_, page, c * lay.column_bytes + 64 * first, 64)
            e.call("llvm.x86.tdpbssd", ir.VoidType(), [_tile(c), _tile(a), _tile(b_)])
    tile = 128 * block.rows
    for c in range(COLUMNS):
        _keep(e, c, temp, block.ints + c * tile)
    keys = [e.load(page, lay.k_scale_at + 64 * c, wide, 4) for c in range(COLUMNS)]
    seen = [b.icmp_signed("<", token_of(e, c), visible.count(e, block, state, 0)) for c in range(COLUMNS)]
    for r in range(block.rows):
        scale = broadcast(e, state, block.scale + 4 * r)
        for c in range(COLUMNS):
            at = block.ints + c * tile + 64 * r
            high, low = (e.to_float(e.load(temp, at + part, ints, 4)) for part in (0, 64 * block.rows))
            x = b.fmul(e.fma(low, fill(1 / LOW, f32, LANES), high), b.fmul(keys[c], scale))
            e.store(temp, 256 * r + 64 * c, b.select(seen[c], x, fill(HIDDEN, f32, LANES)), 4)
        prefetch.scores(c64(r))
    return [e.load(page, lay.v_scale_at + 64 * c, wide, 4) for c in range(COLUMNS)]


def _values(e: Emit, block: Block, page, state, temp, prefetch: Prefetch) -> None:
    b, lay = e.b, block.layout
    lanes, tile = lay.padded // LANES, 128 * block.rows
    assert WEIGHT == 16383.0  # high codes count 128
    _load(e, A, temp, block.high_weights, 64)
    for start in range(0, lanes, 4):
        group = range(start, min(lanes, start + 4))
        for n in group:
            e.call("llvm.x86.tilezero", ir.VoidType(), [_tile(n - start)])
            _load(e, B, page, lay.v_at + 64 * n, 4 * lay.padded)
            e.call("llvm.x86.tdpbusd", ir.VoidType(), [_tile(n - start), _tile(A), _tile(B)])
        for n in group:
            _keep(e, n - start, temp, block.ints + (n - start) * tile)
        for n in group:
            for r in range(block.rows):
                at = block.ints + (n - start) * tile + 64 * r
                high, low = (e.load(temp, at + part, ints, 4) for part in (0, 64 * block.rows))
                sums = e.to_float(b.add(b.shl(high, fill(7, i32, LANES)), low))
                add_output(e, block, state, temp, r, c64(64 * n), sums, 64)
            prefetch.values(c64(n))
