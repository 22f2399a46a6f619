"""Rows of the embedding table, dequantized straight from the GGML blocks of the mapped file."""
from __future__ import annotations

from collections.abc import Callable

from numba import njit

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.memory import bf16_at, f16_at, f32_at, fetch_add, i8_at, i32_at, i64_at, set_f32, u8_at
from edge_runtime.kernels.step_state import ROWS, TOKEN_IDS

OPERANDS = ("counter", "step", "table", "row_bytes", "width", "x", "x_stride")
(COUNTER, STEP, TABLE, ROW_BYTES, WIDTH, X, X_STRIDE) = range(len(OPERANDS))
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
          "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}


def operands(**values: int):
    """x[row, :width] = table[token_ids[row]]; token ids int32 in the step block, already checked; strides in bytes."""
    return memory.operands(OPERANDS, **values)


def _weight(name: str) -> Callable:
    """`weight(block, i)`: the i-th weight of a block, float32; formulas of ggml-quants.c."""

    def q4_0(p, i):
        byte = u8_at(p, 2 + (i & 15))
        return f16_at(p, 0) * (((byte >> 4) if i >= 16 else (byte & 15)) - 8)

    def q4_1(p, i):
        byte = u8_at(p, 4 + (i & 15))
        return f16_at(p, 0) * ((byte >> 4) if i >= 16 else (byte & 15)) + f16_at(p, 1)

    def q5_0(p, i):
        byte, high = u8_at(p, 6 + (i & 15)), (i32_at(p + 2, 0) >> i) & 1
        return f16_at(p, 0) * ((((byte >> 4) if i >= 16 else (byte & 15)) | (high << 4)) - 16)

    def q5_1(p, i):
        byte, high = u8_at(p, 8 + (i & 15)), (i32_at(p + 4, 0) >> i) & 1
        return f16_at(p, 0) * (((byte >> 4) if i >= 16 else (byte & 15)) | (high << 4)) + f16_at(p, 1)

    def q8_0(p, i):
        return f16_at(p, 0) * i8_at(p, 2 + i)

    def k_scale(p, t):
        """scale and minimum of sub-block t, 6 bits each, in 12 bytes at p + 4."""
        if t < 4:
            scale, minimum = u8_at(p, 4 + t) & 63, u8_at(p, 8 + t) & 63
        else:
            scale = (u8_at(p, 8 + t) & 15) | ((u8_at(p, t) >> 6) << 4)
            minimum = (u8_at(p, 8 + t) >> 4) | ((u8_at(p, 4 + t) >> 6) << 4)
        return f16_at(p, 0) * scale, f16_at(p, 1) * minimum

    k_scale = njit(inline="always")(k_scale)

    def q4_k(p, i):
        t = i >> 5
        scale, minimum = k_scale(p, t)
        byte = u8_at(p, 16 + 32 * (t >> 1) + (i & 31))
        return scale * ((byte >> 4) if t & 1 else (byte & 15)) - minimum

    def q5_k(p, i):
        t = i >> 5
        scale, minimum = k_scale(p, t)
        byte, high = u8_at(p, 48 + 32 * (t >> 1) + (i & 31)), (u8_at(p, 16 + (i & 31)) >> t) & 1
        return scale * (((byte >> 4) if t & 1 else (byte & 15)) | (high << 4)) - minimum

    def q6_k(p, i):
        half, k, at = i >> 7, (i >> 5) & 3, i & 31
        byte = u8_at(p, 64 * half + 32 * (k & 1) + at)
        high = (u8_at(p, 128 + 32 * half + at) >> (2 * k)) & 3
        code = (((byte >> 4) if k >= 2 else (byte & 15)) | (high << 4)) - 32
        return f16_at(p + 208, 0) * i8_at(p, 192 + (i >> 4)) * code

    chosen = {"F32": lambda p, i: f32_at(p, 0), "F16": lambda p, i: f16_at(p, 0), "BF16": lambda p, i: bf16_at(p, 0),
              "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k,
              "Q6_K": q6_k}[name]
    return njit(inline="always")(chosen)


def make_embed(name: str) -> Callable:
    weight = _weight(name)
    size, size_bytes = BLOCKS[name]

    def embed(op, thread, threads):
        step = i64_at(op, STEP)
        rows, ids, counter = i64_at(step, ROWS), i64_at(step, TOKEN_IDS), i64_at(op, COUNTER)
        table, row_bytes, width = i64_at(op, TABLE), i64_at(op, ROW_BYTES), i64_at(op, WIDTH)
        while True:
            m = fetch_add(counter, 1)
            if m >= rows:
                break
            source, target = table + i32_at(ids, m) * row_bytes, i64_at(op, X) + m * i64_at(op, X_STRIDE)
            for block in range(width // size):
                for i in range(size):
                    set_f32(target, block * size + i, weight(source + block * size_bytes, i))

    return embed


def embed_kernel(name: str, progress: Progress | None = None) -> int:
    """Address of the kernel for a table of GGML type `name`."""
    return compile_kernel(f"embed {name}", lambda: make_embed(name), progress)
