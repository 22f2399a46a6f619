"""Quantizers of the K formats: 256 weights with quantized scales under one or two f16 scales.

Groups are fitted one by one (quant.scale_search), their scales are rounded to the format's 6 or 8 bits, and then codes
and the f16 scales are fitted again in turn for the whole block, since rounding moved them.
"""
from __future__ import annotations

import numpy as np

from edge_runtime.quant.scale_search import TINY, search_scale, search_scale_min

FINE_ROUNDS = 2
STEPS_4 = np.linspace(-1.0, 1.0, 21)
STEPS_5 = np.linspace(-0.6, 0.9, 16)
STEPS_6 = np.linspace(-0.8, 0.8, 9)


def quantize_q4_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [N, 256] and the weights of its errors, to uint8 [N, 144]."""
    head, codes = _with_minima(x, weights, 16, STEPS_4)
    return np.concatenate([head, _nibbles(codes)], axis=1)


def quantize_q5_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [N, 256] and the weights of its errors, to uint8 [N, 176]."""
    head, codes = _with_minima(x, weights, 32, STEPS_5)
    high = np.zeros((len(x), 32), np.uint8)  # bit g of byte i: the fifth bit of weight i of group g
    for group in range(8):
        high |= (codes[:, group] >> 4) << group
    return np.concatenate([head, high, _nibbles(codes & 15)], axis=1)


def quantize_q6_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [N, 256] and the weights of its errors, to uint8 [N, 210]."""
    n = len(x)
    groups = x.reshape(n, 16, 16)
    w = weights.reshape(n, 16, 16)
    scales = search_scale(x.reshape(-1, 16), weights.reshape(-1, 16), -32, 31, STEPS_6).reshape(n, 16)
    # The scale of largest magnitude takes -128, the one step more of int8.
    top = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)[:, 0]
    super_scale = _half(top / np.float32(-128))
    best = _Best()
    for _ in range(FINE_ROUNDS + 1):
        eighths = np.clip(np.rint(scales * _inverse(super_scale)[:, None]), -128, 127)
        step = (super_scale[:, None] * eighths)[:, :, None]
        codes = np.clip(np.rint(groups * _inverse(step)), -32, 31)
        best.keep(_error(groups, step * codes, w), super_scale, eighths, codes)
        unit = eighths[:, :, None] * codes
        sum_xl = (w * groups * unit).sum(axis=(1, 2), dtype=np.float64)
        sum_l2 = (w * unit * unit).sum(axis=(1, 2), dtype=np.float64)
        super_scale = _half(np.where(sum_l2 > TINY, sum_xl / np.maximum(sum_l2, TINY), super_scale))
    super_scale, eighths, codes = best.values
    unsigned = (codes.reshape(n, 2, 4, 32) + 32).astype(np.uint8)  # half, quarter of it, weight
    low = (unsigned[:, :, 0:2] & 15) | (unsigned[:, :, 2:4] & 15) << 4
    high = np.zeros((n, 2, 32), np.uint8)
    for quarter in range(4):
        high |= (unsigned[:, :, quarter] >> 4) << (2 * quarter)
    parts = [low.reshape(n, 128), high.reshape(n, 64), eighths.astype(np.int8).view(np.uint8), _half_bytes(super_scale)]
    return np.concatenate(parts, axis=1)


def _with_minima(x: np.ndarray, weights: np.ndarray, levels: int, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 16 leading bytes of Q4_K and Q5_K blocks, uint8 [N, 16], and the codes, uint8 [N, 8, 32]."""
    n = len(x)
    groups = x.reshape(n, 8, 32)
    w = weights.reshape(n, 8, 32)
    scales, lows = search_scale_min(x.reshape(-1, 32), weights.reshape(-1, 32), levels, steps)
    scales, minima = scales.reshape(n, 8), -lows.reshape(n, 8)
    super_scale = _half(scales.max(axis=1) / np.float32(63))
    super_minimum = _half(minima.max(axis=1) / np.float32(63))
    best = _Best()
    for _ in range(FINE_ROUNDS + 1):
        s = np.clip(np.rint(scales * _inverse(super_scale)[:, None]), 0, 63)
        m = np.clip(np.rint(minima * _inverse(super_minimum)[:, None]), 0, 63)
        step = (super_scale[:, None] * s)[:, :, None]
        minimum = (super_minimum[:, None] * m)[:, :, None]
        codes = np.clip(np.rint((groups + minimum) * _inverse(step)), 0, levels - 1)
        best.keep(_error(groups, step * codes - minimum, w), super_scale, super_minimum, s, m, codes)
        super_scale, super_minimum = _fit_supers(groups, w, s[:, :, None] * codes, m, super_scale, super_minimum)
    super_scale, super_minimum, s, m, codes = best.values
    head = [_half_bytes(super_scale), _half_bytes(super_minimum), pack_k_scales(s.astype(np.uint8), m.astype(np.uint8))]
    return np.concatenate(head, axis=1), codes.astype(np.uint8)


def _fit_supers(x: np.ndarray, w: np.ndarray, unit: np.ndarray, m: np.ndarray, super_scale: np.ndarray,
                super_minimum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Least squares of `x ~ super_scale * unit - super_minimum * m` over whole blocks."""
    wu = w * unit
    uu = (wu * unit).sum(axis=(1, 2), dtype=np.float64)
    ux = (wu * x).sum(axis=(1, 2), dtype=np.float64)
    um = (wu.sum(axis=2, dtype=np.float64) * m).sum(axis=1)
    mm = (w.sum(axis=2, dtype=np.float64) * m * m).sum(axis=1)
    mx = ((w * x).sum(axis=2, dtype=np.float64) * m).sum(axis=1)
    determinant = uu * mm - um * um
    solvable = determinant > 1e-9 * np.maximum(uu * mm, TINY)
    safe = np.where(solvable, determinant, 1)
    scale = np.where(solvable, (ux * mm - mx * um) / safe, super_scale)
    minimum = np.where(solvable, (ux * um - mx * uu) / safe, super_minimum)
    usable = (scale > 0) & (minimum >= 0)
    return _half(np.where(usable, scale, super_scale)), _half(np.where(usable, minimum, super_minimum))


class _Best:
    """The arrays of the lowest error so far, block by block."""

    def __init__(self) -> None:
        self.error: np.ndarray | None = None
        self.values: tuple[np.ndarray, ...] = ()

    def keep(self, error: np.ndarray, *values: np.ndarray) -> None:
        if self.error is None:
            self.error, self.values = error, values
            return
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.values = tuple(np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                            for new, old in zip(values, self.values))  # fmt: skip


def pack_k_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """uint8 [N, 8] each, 0 to 63, to the 12 bytes that quant.dequantize.k_scales reads."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 32] to [N, 128]: groups 2i and 2i + 1 share 32 bytes."""
    pairs = codes.reshape(len(codes), 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), 128)


def _error(x: np.ndarray, approximation: np.ndarray, w: np.ndarray) -> np.ndarray:
    difference = x - approximation
    return (w * difference * difference).sum(axis=(1, 2), dtype=np.float64)


def _half(x: np.ndarray) -> np.ndarray:
    """Rounded to f16, kept as float32. ValueError where it exceeds f16."""
    with np.errstate(over="ignore"):
        half = np.asarray(x).astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"a scale of {np.abs(x).max():g} exceeds f16 (65,504)")
    return half.astype(np.float32)


def _half_bytes(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2").view(np.uint8).reshape(-1, 2)


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), x, out=np.zeros_like(x), where=np.abs(x) > 1e-37)
