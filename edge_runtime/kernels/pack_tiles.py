"""GGML blocks, as they lie in a file, become kernel tiles (see `tiles`): one pass, 16 rows at a time.

Works on 32-bit words: four codes of one row are one word of a step.
"""
from __future__ import annotations

from collections.abc import Callable

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.memory import (
    copy_bytes,
    fetch_add,
    i8_at,
    i32_at,
    i64_at,
    set_i8,
    set_i32,
    u8_at,
    zero_bytes,
)
from edge_runtime.kernels.tiles import FLOAT_FORMATS, FORMATS, weight_bias

OPERANDS = ("counter", "source", "source_row_bytes", "rows", "inputs", "target", "block_row_bytes")
(COUNTER, SOURCE, SOURCE_ROW_BYTES, N, K, TARGET, BLOCK_ROW_BYTES) = range(len(OPERANDS))
ONES, NIBBLES, PAIRS = 0x01010101, 0x0F0F0F0F, 0x03030303
BLOCK_INPUTS = {"Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def operands(**values: int):
    """rows: rows of the matrix (the last row block is padded with zeros); inputs: K; target: packed matrix."""
    return memory.operands(OPERANDS, **values)


def _writers(name: str) -> Callable:
    """`write(source_block, tiles, row)`: one GGML block of one row into its tile (or block of 8 tiles)."""
    from numba import njit

    form = FORMATS[name]
    codes, tile_bytes, header = form.code_bytes, form.tile_bytes, form.header_bytes
    flip = 0x80808080 if weight_bias() else 0

    def q4(source, tile, r):
        for i in range(4):
            set_i32(tile + 64 * i + 4 * r, 0, i32_at(source, i))

    q4 = njit(inline="always")(q4)

    def high_bits(bits, tile, r):
        word = 0
        for j in range(8):
            four = (bits >> (4 * j)) & 15
            word |= ((four * 0x00204081) & ONES) << j
        set_i32(tile + 256 + 4 * r, 0, word)

    high_bits = njit(inline="always")(high_bits)

    def q4_0(source, tile, r):
        q4(source + 2, tile, r)
        copy_bytes(tile + codes + 2 * r, source, 2)

    def q4_1(source, tile, r):
        q4(source + 4, tile, r)
        copy_bytes(tile + codes + 2 * r, source, 2)
        copy_bytes(tile + codes + 32 + 2 * r, source + 2, 2)

    def q5_0(source, tile, r):
        q4(source + 6, tile, r)
        high_bits(i32_at(source + 2, 0) & 0xFFFFFFFF, tile, r)
        copy_bytes(tile + codes + 2 * r, source, 2)

    def q5_1(source, tile, r):
        q4(source + 8, tile, r)
        high_bits(i32_at(source + 4, 0) & 0xFFFFFFFF, tile, r)
        copy_bytes(tile + codes + 2 * r, source, 2)
        copy_bytes(tile + codes + 32 + 2 * r, source + 2, 2)

    def q8_0(source, tile, r):
        for j in range(8):
            set_i32(tile + 64 * j + 4 * r, 0, i32_at(source + 2, j) ^ flip)
        copy_bytes(tile + codes + 2 * r, source, 2)

    def k_scales(source, block, r):
        """6-bit scales and minimums of 8 tiles, 12 bytes at source + 4; d and dmin before them."""
        copy_bytes(block + 2 * r, source, 2)
        copy_bytes(block + 32 + 2 * r, source + 2, 2)
        packed = source + 4
        for t in range(8):
            if t < 4:
                scale, minimum = u8_at(packed, t) & 63, u8_at(packed, t + 4) & 63
            else:
                scale = (u8_at(packed, t + 4) & 15) | ((u8_at(packed, t - 4) >> 6) << 4)
                minimum = (u8_at(packed, t + 4) >> 4) | ((u8_at(packed, t) >> 6) << 4)
            tile = block + header + t * tile_bytes + codes
            set_i8(tile, r, scale)
            set_i8(tile, 16 + r, minimum)

    k_scales = njit(inline="always")(k_scales)

    def k_nibbles(source, block, r):
        """4 chunks of 32 bytes: low nibbles are one tile, high nibbles the next."""
        for chunk in range(4):
            low = block + header + 2 * chunk * tile_bytes + 4 * r
            high = low + tile_bytes
            for i in range(4):
                a, b = i32_at(source + 32 * chunk, i), i32_at(source + 32 * chunk, i + 4)
                set_i32(low + 64 * i, 0, (a & NIBBLES) | ((b & NIBBLES) << 4))
                set_i32(high + 64 * i, 0, ((a >> 4) & NIBBLES) | (b & (NIBBLES << 4)))

    k_nibbles = njit(inline="always")(k_nibbles)

    def q4_k(source, block, r):
        k_scales(source, block, r)
        k_nibbles(source + 16, block, r)

    def q5_k(source, block, r):
        k_scales(source, block, r)
        k_nibbles(source + 48, block, r)
        for t in range(8):
            word = 0
            for j in range(8):
                word |= ((i32_at(source + 16, j) >> t) & ONES) << j
            set_i32(block + header + t * tile_bytes + 256 + 4 * r, 0, word)

    def q6_k(source, block, r):
        """128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d."""
        copy_bytes(block + 2 * r, source + 208, 2)
        for t in range(8):
            half, k = t // 4, t % 4
            low, high = source + 64 * half + 32 * (k & 1), source + 128 + 32 * half
            shift = 4 * (k >> 1)
            tile = block + header + t * tile_bytes
            for i in range(4):
                a, b = (i32_at(low, i) >> shift) & NIBBLES, (i32_at(low, i + 4) >> shift) & NIBBLES
                set_i32(tile + 64 * i + 4 * r, 0, a | (b << 4))
            for plane in range(2):
                word = 0
                for i in range(4):
                    word |= ((i32_at(high, 4 * plane + i) >> (2 * k)) & PAIRS) << (2 * i)
                set_i32(tile + 256 + 64 * plane + 4 * r, 0, word)
            for part in range(2):
                set_i8(tile + codes, 16 * part + r, i8_at(source + 192, 2 * t + part))

    return njit(inline="always")({"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k,
                                  "Q5_K": q5_k, "Q6_K": q6_k}[name])


def make_pack(name: str) -> Callable:
    write = _writers(name)
    form = FORMATS[name]
    source_bytes, block_inputs, block_bytes = BLOCK_BYTES[name], form.block_inputs, form.block_bytes

    def pack(op, thread, threads):
        counter, source, row_bytes = i64_at(op, COUNTER), i64_at(op, SOURCE), i64_at(op, SOURCE_ROW_BYTES)
        n, blocks, target, stride = i64_at(op, N), i64_at(op, K) // block_inputs, i64_at(op, TARGET), \
            i64_at(op, BLOCK_ROW_BYTES)
        while True:
            first = fetch_add(counter, 1)
            if first * 16 >= n:
                break
            out = target + first * stride
            rows = min(16, n - first * 16)
            if rows < 16:
                zero_bytes(out, stride)
            start = source + first * 16 * row_bytes
            for g in range(blocks):
                for r in range(rows):
                    write(start + r * row_bytes + g * source_bytes, out + g * block_bytes, r)

    return pack


def make_pack_float(name: str) -> Callable:
    """[N, K] elements become [N / 16, K, 16]."""
    size = FLOAT_FORMATS[name]

    def pack(op, thread, threads):
        counter, source, row_bytes = i64_at(op, COUNTER), i64_at(op, SOURCE), i64_at(op, SOURCE_ROW_BYTES)
        n, inputs, target, stride = i64_at(op, N), i64_at(op, K), i64_at(op, TARGET), i64_at(op, BLOCK_ROW_BYTES)
        while True:
            first = fetch_add(counter, 1)
            if first * 16 >= n:
                break
            out = target + first * stride
            rows = min(16, n - first * 16)
            if rows < 16:
                zero_bytes(out, stride)
            for r in range(rows):
                row = source + (first * 16 + r) * row_bytes
                for k in range(inputs):
                    copy_bytes(out + (k * 16 + r) * size, row + k * size, size)

    return pack


def pack_kernel(name: str, progress: Progress | None = None) -> int:
    """Address of the kernel that packs matrices of GGML type `name`."""
    make = (lambda: make_pack_float(name)) if name in FLOAT_FORMATS else (lambda: make_pack(name))
    return compile_kernel(f"pack {name} bias{weight_bias()}", make, progress)
