"""Matrix products with many rows on bf16 matrix tiles (AMX): y = init + x @ W.T for weights in any tile format.

A panel of weights is unpacked to bf16 once, for K_BLOCK inputs at a time, and used for all activation rows. bf16
keeps 8 bits of each weight and activation, so the error is below that of int8 activations with a scale per 32.

Activations: bf16 tiles [M / 16][K / 32][16 rows][32 inputs], 1 KB each (a row-major matrix would put the 16 rows of a
tile into the same cache sets). Unpacked weights: [row block pair][K / 32][2][16 pairs of inputs][16 rows][2].
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.matmul_tiles import TileCodes, load_scales
from edge_runtime.kernels.memory import fetch_add, i64_at
from edge_runtime.kernels.tiles import FORMATS, STEPS, TileFormat
from edge_runtime.kernels.vector_ir import LANES, Emit, c64, f16, fill, i8, i16, i32, micro_kernel, vec, wide

OPERANDS = ("counter", "step", "rows_at", "first_at", "weights", "row_blocks", "row_bytes", "inputs", "x", "init",
            "init_stride", "y", "y_stride", "scratch", "scratch_stride", "config")
(COUNTER, STEP, ROWS_AT, FIRST_AT, WEIGHTS, ROW_BLOCKS, ROW_BYTES, INPUTS, X, INIT, INIT_STRIDE, Y, Y_STRIDE,
 SCRATCH, SCRATCH_STRIDE, CONFIG) = range(len(OPERANDS))
TILE = 1024  # bytes of a matrix tile, 16 rows of 64 bytes
PANEL = 8  # row blocks unpacked together: 128 rows x K_BLOCK x 2 bytes lie in L2
K_BLOCK = 512  # inputs; one activation block of 32 rows and one pair of row blocks are 32 KB each
K_STEPS = K_BLOCK // 32
ROUND_UP = 1 + 2 ** -8.5  # half a unit of bf16's last place, on average: then truncation rounds


def operands(**values: int):
    """As `matmul_tiles.operands`, with `x` in bf16 tiles and y, init padded to whole tiles of 16 rows.

    first_at: index in the step block of the row of y (and init) that row 0 of `x` belongs to.

    scratch: `scratch_bytes(rows)` per thread, scratch_stride apart; config: address of `tile_config()`.
    """
    return memory.operands(OPERANDS, **values)


def tile_config() -> np.ndarray:
    """Palette 1, all 8 tiles 16 rows of 64 bytes: what `ldtilecfg` reads, uint8 [64], aligned."""
    config = memory.aligned(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return config


def scratch_bytes(rows: int) -> int:
    """Unpacked weights and sums of one thread for a step of `rows` rows."""
    return PANEL * K_STEPS * TILE + -(-rows // LANES) * PANEL * TILE


def _tile(e: Emit, name: str, *arguments: ir.Value) -> None:
    e.call(f"llvm.x86.{name}", ir.VoidType(), list(arguments))


def _t(k: int) -> ir.Constant:
    return ir.Constant(i8, k)


@micro_kernel
def load_config(e, config):
    _tile(e, "ldtilecfg", e.pointer(config, i8))


@micro_kernel
def release_tiles(e):
    _tile(e, "tilerelease")


def bf16_pairs(e: Emit, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two <16 x float> as 16 pairs of bf16 (truncated): <32 x i16>."""
    words = vec(i16, 32)
    order = [w for lane in range(16) for w in (2 * lane + 1, 32 + 2 * lane + 1)]
    return e.shuffle(e.b.bitcast(low, words), e.b.bitcast(high, words), order)


def make_unpack(form: TileFormat) -> Callable:
    """Unpacks `tiles` tiles of one row block, from tile `first`, to bf16: target + 2 KB * tile."""

    @micro_kernel
    def unpack(e, row_block, first, tiles, target):
        b = e.b
        up = fill(ROUND_UP, ir.FloatType(), LANES)
        with e.loop(tiles) as l:
            index = b.add(first, l.index)
            if form.tiles_per_block == 1:
                tile, d, dmin = b.add(row_block, b.mul(index, c64(form.tile_bytes))), None, None
            else:
                shift = c64(form.tiles_per_block.bit_length() - 1)
                block = b.add(row_block, b.mul(b.lshr(index, shift), c64(form.block_bytes)))
                d = b.fmul(e.half_to_float(e.load(block, 0, vec(f16, LANES))), up)
                dmin = b.fmul(e.half_to_float(e.load(block, 32, vec(f16, LANES))), up) if form.minimum else None
                inside = b.and_(index, c64(form.tiles_per_block - 1))
                tile = e.at(b.add(block, b.mul(inside, c64(form.tile_bytes))), form.header_bytes)
            scale, minimum = load_scales(e, form, tile, d, dmin)
            if form.scales == "f16":
                scale = [b.fmul(s, up) for s in scale]
                minimum = b.fmul(minimum, up) if minimum is not None else None
            elif minimum is not None:
                minimum = e.negative(minimum)
            out = b.add(target, b.mul(l.index, c64(2 * TILE)))
            e.prefetch(tile, 2 * form.tile_bytes)
            codes = TileCodes(e, form, tile)
            offsets = []
            for s in scale:
                offset = b.fmul(s, fill(-float(form.zero), ir.FloatType(), LANES)) if form.zero else None
                if minimum is not None:
                    offset = minimum if offset is None else b.fadd(offset, minimum)
                offsets.append(offset)
            for j in range(STEPS):
                part = j * len(scale) // STEPS
                words = b.bitcast(codes.step(j), vec(i32, LANES))
                values = []
                for byte in range(4):
                    code = b.lshr(words, fill(8 * byte, i32, LANES)) if byte else words
                    if byte < 3:
                        code = b.and_(code, fill(255, i32, LANES))
                    values.append(e.fma(b.sitofp(code, wide), scale[part], offsets[part])
                                  if offsets[part] is not None else b.fmul(b.sitofp(code, wide), scale[part]))
                for pair in range(2):
                    e.store(out, (2 * j + pair) * 64, bf16_pairs(e, values[2 * pair], values[2 * pair + 1]))

    return unpack


def make_tile_sums(m_tiles: int, n_tiles: int) -> Callable:
    """sums[m_tiles x n_tiles] (+)= activation tiles x weight tiles over `steps` steps of 32 inputs."""

    @micro_kernel
    def tile_sums(e, x, x_next, w, steps, source, source_row, source_m, source_n, target, target_row, target_m,
                  target_n):
        # *_row, *_m, *_n: bytes between the rows of a tile, between activation tiles and between row blocks
        b = e.b
        grid = [(m, n) for m in range(m_tiles) for n in range(n_tiles)]
        number = {key: i for i, key in enumerate(grid)}
        place = lambda base, by_m, by_n, m, n: b.add(b.add(base, b.mul(by_m, c64(m))), b.mul(by_n, c64(n)))
        for m, n in grid:
            at = place(source, source_m, source_n, m, n)
            _tile(e, "tileloadd64", _t(number[m, n]), e.pointer(at, i8), source_row)
        with e.loop(steps) as l:
            activations, weights = b.add(x, b.mul(l.index, c64(TILE))), b.add(w, b.mul(l.index, c64(2 * TILE)))
            for n in range(n_tiles):
                _tile(e, "tileloadd64", _t(6 + n), e.pointer(e.at(weights, n * TILE), i8), c64(64))
            for m in range(m_tiles):
                _tile(e, "tileloadd64", _t(4 + m), e.pointer(b.add(activations, b.mul(x_next, c64(m))), i8), c64(64))
                for n in range(n_tiles):
                    _tile(e, "tdpbf16ps", _t(number[m, n]), _t(4 + m), _t(6 + n))
        for m, n in grid:
            at = place(target, target_m, target_n, m, n)
            _tile(e, "tilestored64", _t(number[m, n]), e.pointer(at, i8), target_row)

    return tile_sums


def make_product(form: TileFormat) -> Callable:
    unpack = make_unpack(form)
    two_two, two_one = make_tile_sums(2, 2), make_tile_sums(2, 1)
    one_two, one_one = make_tile_sums(1, 2), make_tile_sums(1, 1)

    def product(op, thread, threads):
        rows = i64_at(i64_at(op, STEP), i64_at(op, ROWS_AT))
        counter, weights, row_blocks = i64_at(op, COUNTER), i64_at(op, WEIGHTS), i64_at(op, ROW_BLOCKS)
        row_bytes, k_tiles, x = i64_at(op, ROW_BYTES), i64_at(op, INPUTS) // 32, i64_at(op, X)
        init, init_stride, y, y_stride = i64_at(op, INIT), i64_at(op, INIT_STRIDE), i64_at(op, Y), i64_at(op, Y_STRIDE)
        row = i64_at(i64_at(op, STEP), i64_at(op, FIRST_AT))
        init, y = init + row * init_stride, y + row * y_stride
        unpacked = i64_at(op, SCRATCH) + thread * i64_at(op, SCRATCH_STRIDE)
        kept = unpacked + PANEL * K_STEPS * TILE
        if rows == 0:
            return
        load_config(i64_at(op, CONFIG))
        m_tiles, x_next = (rows + 15) // 16, k_tiles * TILE
        while True:
            first = fetch_add(counter, PANEL)
            if first >= row_blocks:
                break
            panel = min(PANEL, row_blocks - first)
            for k in range(0, k_tiles, K_STEPS):
                steps = min(K_STEPS, k_tiles - k)
                for r in range(panel):
                    unpack(weights + (first + r) * row_bytes, k, steps,
                           unpacked + (r // 2) * K_STEPS * 2 * TILE + (r % 2) * TILE)
                begins, ends = k == 0, k + steps == k_tiles
                for m in range(0, m_tiles, 2):
                    a = x + (m * k_tiles + k) * TILE
                    for r in range(0, panel, 2):
                        w = unpacked + (r // 2) * K_STEPS * 2 * TILE
                        here = kept + (m * PANEL + r) * TILE
                        source, source_row, source_m, source_n = here, 64, PANEL * TILE, TILE
                        target, target_row, target_m, target_n = here, 64, PANEL * TILE, TILE
                        if begins:
                            source, source_row = init + m * 16 * init_stride + (first + r) * 64, init_stride
                            source_m, source_n = 16 * init_stride, 64
                        if ends:
                            target, target_row = y + m * 16 * y_stride + (first + r) * 64, y_stride
                            target_m, target_n = 16 * y_stride, 64
                        two_m, two_n = m + 1 < m_tiles, r + 1 < panel
                        if two_m and two_n:
                            two_two(a, x_next, w, steps, source, source_row, source_m, source_n, target, target_row,
                                    target_m, target_n)
                        elif two_m:
                            two_one(a, x_next, w, steps, source, source_row, source_m, source_n, target, target_row,
                                    target_m, target_n)
                        elif two_n:
                            one_two(a, x_next, w, steps, source, source_row, source_m, source_n, target, target_row,
                                    target_m, target_n)
                        else:
                            one_one(a, x_next, w, steps, source, source_row, source_m, source_n, target, target_row,
                                    target_m, target_n)
        release_tiles()

    return product


def product_kernel(name: str, progress: Progress | None = None) -> int:
    """Address of the kernel for tiles of GGML type `name`."""
    return compile_kernel(f"matmul amx {name}", lambda: make_product(FORMATS[name]), progress)
