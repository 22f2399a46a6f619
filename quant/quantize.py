"""float32 weights to blocks: round to nearest for the simple formats, and a search for the best scales.

`method="plain"` gives the bytes of ggml's reference quantizers for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0. `"search"` picks
scales that minimize the weighted squared error; the K formats always search.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_runtime.quant.formats import BlockFormat, block_format
from edge_runtime.quant.quantize_k import quantize_q4_k, quantize_q5_k, quantize_q6_k
from edge_runtime.quant.scale_search import search_scale, search_scale_min

METHODS = ("auto", "plain", "search")
CHUNK_WEIGHTS = 1 << 17  # half a megabyte of float32: the temporaries of a chunk stay in the L2 cache
SEARCH_STEPS = np.linspace(-1.0, 1.0, 21)


def quantize(weights: np.ndarray, format: str | BlockFormat, importance: np.ndarray | None = None,
             method: str = "auto") -> np.ndarray:  # fmt: skip
    """float32 [..., inputs] to the bytes of `format`, uint8 [..., row_bytes].

    importance: weights of the squared error, float32 [inputs] (mean squares of the activations, say) or of the shape of
    `weights`. method: "plain", "search", or "auto": search where an importance is given.
    ValueError: rows that are no multiple of the block, weights that are not finite or exceed what the format can store,
    an importance beside "plain".
    """
    format = block_format(format)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    weights = np.ascontiguousarray(weights, np.float32)
    inputs = weights.shape[-1]
    row_bytes = format.row_bytes(inputs)
    if not np.isfinite(weights).all():
        raise ValueError("weights hold NaN or infinity")
    if importance is not None:
        if method == "plain":
            raise ValueError('method="plain" takes no importance')
        importance = _checked_importance(importance, weights)
    shape = (*weights.shape[:-1], row_bytes)
    searching = method == "search" or (method == "auto" and importance is not None)
    if format.is_float:
        return _FLOATS[format.name](weights).view(np.uint8).reshape(shape)
    write = _SEARCHED[format.name] if searching or format.name not in _PLAIN else _PLAIN[format.name]
    blocks = weights.reshape(-1, format.block_size)
    out = np.empty((len(blocks), format.block_bytes), np.uint8)
    step = CHUNK_WEIGHTS // format.block_size
    for first in range(0, len(blocks), step):
        chunk = slice(first, first + step)
        error_weights = np.ones_like(blocks[chunk]) if importance is None else _rows(importance, weights, chunk, format)
        out[chunk] = write(blocks[chunk], error_weights)
    return out.reshape(shape)


def _checked_importance(importance: np.ndarray, weights: np.ndarray) -> np.ndarray:
    importance = np.asarray(importance, np.float32)
    if importance.shape not in (weights.shape[-1:], weights.shape):
        raise ValueError(f"importance has the shape {importance.shape}, the weights {weights.shape}")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("importance must be finite and not negative")
    mean = float(importance.mean(dtype=np.float64))
    # A floor keeps inputs that were never seen from being thrown away, and every least-squares problem solvable.
    return (importance / mean + np.float32(1e-4)) if mean > 0 else np.ones_like(importance)


def _rows(importance: np.ndarray, weights: np.ndarray, chunk: slice, format: BlockFormat) -> np.ndarray:
    """The importance of a chunk of blocks, float32 [blocks, block_size]."""
    blocks = importance.reshape(-1, format.block_size)
    if importance.shape == weights.shape:
        return blocks[chunk]
    count = weights.size // format.block_size
    return blocks[np.arange(chunk.start, min(chunk.stop, count)) % len(blocks)]


def half_bytes(x: np.ndarray) -> np.ndarray:
    """float32 [N] to f16, as uint8 [N, 2]. ValueError where a scale exceeds f16."""
    return as_half(x).view(np.uint8).reshape(-1, 2)


def as_half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.asarray(x).astype("<f2")
    if not np.isfinite(half).all():
        raise ValueError(f"a value of {np.abs(x).max():g} exceeds f16 (65,504)")
    return half


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [N, 32], 0 to 15, to [N, 16]: the first half in the low nibbles."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def _pack_fives(codes: np.ndarray) -> list[np.ndarray]:
    """uint8 [N, 32], 0 to 31: 4 bytes of high bits, 16 of nibbles."""
    return [np.packbits(codes >> 4, axis=1, bitorder="little"), _pack_nibbles(codes & 15)]


def _peak(x: np.ndarray) -> np.ndarray:
    """The (first) value of largest magnitude of each row, float32 [N, 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 for scales so small that it would overflow; f16 stores those as 0."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > 1e-37)


def _symmetric(x: np.ndarray, half_levels: int) -> tuple[np.ndarray, np.ndarray]:
    scale = _peak(x) / np.float32(-half_levels)
    codes = np.trunc(x * _inverse(scale) + np.float32(half_levels + 0.5))
    return scale[:, 0], np.minimum(codes, 2 * half_levels - 1).astype(np.uint8)


def _symmetric_searched(x: np.ndarray, weights: np.ndarray, half_levels: int) -> tuple[np.ndarray, np.ndarray]:
    scale = as_half(search_scale(x, weights, -half_levels, half_levels - 1, SEARCH_STEPS)).astype(np.float32)
    codes = np.rint(x * _inverse(scale)[:, None])
    return scale, (np.clip(codes, -half_levels, half_levels - 1) + half_levels).astype(np.uint8)


def _with_minimum(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - low) / np.float32(levels - 1)
    codes = np.trunc((x - low) * _inverse(scale) + np.float32(0.5))
    return scale[:, 0], low[:, 0], np.clip(codes, 0, levels - 1).astype(np.uint8)


def _with_minimum_searched(x: np.ndarray, weights: np.ndarray, levels: int) -> tuple[np.ndarray, ...]:
    scale, low = search_scale_min(x, weights, levels, SEARCH_STEPS, minimum_is_negative=False)
    scale, low = as_half(scale).astype(np.float32), as_half(low).astype(np.float32)
    codes = np.rint((x - low[:, None]) * _inverse(scale)[:, None])
    return scale, low, np.clip(codes, 0, levels - 1).astype(np.uint8)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=1)


def _q4_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _join([half_bytes(scale), _pack_nibbles(codes)])


def _q4_1(scale: np.ndarray, low: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _join([half_bytes(scale), half_bytes(low), _pack_nibbles(codes)])


def _q5_0(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _join([half_bytes(scale), *_pack_fives(codes)])


def _q5_1(scale: np.ndarray, low: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _join([half_bytes(scale), half_bytes(low), *_pack_fives(codes)])


def _q8_0(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))  # halves away from zero, as C's roundf
    return _join([half_bytes(scale[:, 0]), codes.astype(np.int8).view(np.uint8)])


def _q8_0_searched(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # -128 stays unused, as in ggml: kernels may take the magnitude of a code.
    scale = as_half(search_scale(x, weights, -127, 127, np.linspace(-2, 0.5, 6))).astype(np.float32)
    codes = np.clip(np.rint(x * _inverse(scale)[:, None]), -127, 127)
    return _join([half_bytes(scale), codes.astype(np.int8).view(np.uint8)])


def _bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise ValueError("a weight exceeds bf16")
    return rounded.astype("<u2")


_FLOATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda x: x.astype("<f4"),
    "F16": as_half,
    "BF16": _bf16,
}
_Writer = Callable[[np.ndarray, np.ndarray], np.ndarray]
_PLAIN: dict[str, _Writer] = {
    "Q4_0": lambda x, w: _q4_0(*_symmetric(x, 8)),
    "Q4_1": lambda x, w: _q4_1(*_with_minimum(x, 16)),
    "Q5_0": lambda x, w: _q5_0(*_symmetric(x, 16)),
    "Q5_1": lambda x, w: _q5_1(*_with_minimum(x, 32)),
    "Q8_0": _q8_0,
}
_SEARCHED: dict[str, _Writer] = {
    "Q4_0": lambda x, w: _q4_0(*_symmetric_searched(x, w, 8)),
    "Q4_1": lambda x, w: _q4_1(*_with_minimum_searched(x, w, 16)),
    "Q5_0": lambda x, w: _q5_0(*_symmetric_searched(x, w, 16)),
    "Q5_1": lambda x, w: _q5_1(*_with_minimum_searched(x, w, 32)),
    "Q8_0": _q8_0_searched,
    "Q4_K": quantize_q4_k,
    "Q5_K": quantize_q5_k,
    "Q6_K": quantize_q6_k,
}
