"""Blocks back to float32, in plain NumPy: the definition of every format, and the oracle of the kernels.

Layouts after ggml-common.h and ggml-quants.c of the ggml project. Results equal `gguf.quants.dequantize` bit for bit.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.quant.formats import BlockFormat, block_format

CHUNK_BLOCKS = 1 << 15  # blocks worked on at once: temporaries stay below 64 MB for blocks of 256


def dequantize(data: np.ndarray, format: str | BlockFormat, shape: Sequence[int]) -> np.ndarray:
    """Raw bytes of a tensor (uint8, any shape) to float32 of `shape` (rows, inputs).

    ValueError where the bytes are not exactly those of `shape`.
    """
    format = block_format(format)
    shape = tuple(int(n) for n in shape)
    weights = math.prod(shape)
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    wanted = format.row_bytes(shape[-1] if shape else 1) * (weights // max(1, shape[-1]) if shape else 1)
    if raw.size != wanted:
        raise ValueError(f"{format.name} {shape} takes {wanted} bytes, not {raw.size}")
    out = np.empty(weights, np.float32)
    blocks = raw.reshape(-1, format.block_bytes)
    target = out.reshape(-1, format.block_size)
    read = _READERS[format.name]
    step = CHUNK_BLOCKS if format.block_size > 1 else CHUNK_BLOCKS * 256
    for first in range(0, len(blocks), step):
        target[first : first + step] = read(blocks[first : first + step])
    return out.reshape(shape)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte `at` of each block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] to [..., 2n]: the low nibbles, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """32 single bits at byte `at`, as 0 or 16, uint8 [blocks, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 scale bytes of Q4_K and Q5_K: uint8 [blocks, 12] to scales and minima, uint8 [blocks, 8], 0 to 63.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low 6 bits; bytes 8-11 hold the low nibbles of scales
    4-7 (low) and minima 4-7 (high), whose top two bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales, minima


def _with_k_scales(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """codes: uint8 [blocks, 8, 32]."""
    scales, minima = k_scales(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales)[:, :, None]
    minimum = (_half(blocks, 2) * minima)[:, :, None]
    return (scale * codes.astype(np.float32) - minimum).reshape(len(blocks), 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    # 32 bytes hold 64 weights: the low nibbles are one group of 32, the high nibbles the next.
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _with_k_scales(blocks, codes)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of high byte i belongs to weight i of group g.
    high = (blocks[:, 16:48][:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _with_k_scales(blocks, codes | high << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    # Halves of 128 weights: 64 bytes of nibbles and 32 bytes of 2-bit highs each.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return (scale[:, :, None] * codes).reshape(len(blocks), 256)


_READERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
