"""How sure a row of logits is: the confidence that lets a token leave early, and the drafted token.

`confidence_reference` is the oracle. Logits that are not numbers give a confidence that is none: no token leaves on it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir

from edge_runtime.kernels.memory import f32_at, set_f32
from edge_runtime.kernels.vector_ir import LANES, c64, f32, fill, micro_kernel, wide

CRITERIA = ("max_prob", "margin", "entropy", "layer")
MAX_PROB, MARGIN, ENTROPY, LAYER = range(4)
LOWEST = -1e30  # what pads a row: a probability of 0
SCRATCH_FLOATS = 16


@micro_kernel
def _largest(e, row, width, out):
    """out[0] = the largest of float32 [width], width a multiple of 16."""
    b = e.b
    with e.loop(width, [fill(LOWEST, f32, LANES)], step=LANES) as l:
        l.next = [e.maximum(e.load(b.add(row, b.mul(l.index, c64(4))), 0, wide), l.state[0])]
    e.store(out, 0, e.reduce_max(l.result[0]))


@micro_kernel
def _sums(e, row, width, out):
    """With d = x - out[0]: out[1] = sum of exp(d), out[2] = sum of d * exp(d)."""
    b = e.b
    top = e.splat(e.load(out, 0, f32, 4))
    with e.loop(width, [fill(0.0, f32, LANES)] * 2, step=LANES) as l:
        d = b.fsub(e.load(b.add(row, b.mul(l.index, c64(4))), 0, wide), top)
        power = b.fadd(e.exp(d), b.fsub(d, d))  # exp bounds its argument: d - d carries NaN on
        bounded = e.maximum(d, fill(-100.0, f32, LANES))
        l.next = [b.fadd(l.state[0], power), e.fma(bounded, power, l.state[1])]
    e.store(out, 4, e.reduce_add(l.result[0]))
    e.store(out, 8, e.reduce_add(l.result[1]))


@micro_kernel
def _log(e, value):
    """value[0] = ln value[0]."""
    e.store(value, 0, e.call("llvm.log.f32", f32, [e.load(value, 0, f32, 4)]))


@micro_kernel
def _exp(e, value):
    """value[0] = exp value[0], at most 0."""
    x = e.splat(e.load(value, 0, f32, 4))
    e.store(value, 0, e.b.extract_element(e.exp(x), ir.Constant(ir.IntType(32), 0)))


@cache
def row_confidence() -> Callable:
    """`confidence(row, width, padded, criterion, scratch)`: float32 of logits float32 [width], whose memory may be
    written up to `padded`, a multiple of 16. scratch: float32 [SCRATCH_FLOATS] of the calling thread."""
    from numba import njit

    first_largest = row_argmax()

    def confidence(row, width, padded, criterion, scratch):
        at = first_largest(row, width, padded, scratch)
        _sums(row, padded, scratch)
        total = f32_at(scratch, 1)
        if criterion == MAX_PROB:
            return np.float32(1.0) / total
        if criterion == MARGIN:
            top = f32_at(scratch, 0)
            set_f32(row, at, np.float32(LOWEST))
            _largest(row, padded, scratch)
            set_f32(row, at, top)
            set_f32(scratch, 3, f32_at(scratch, 0) - top)
            _exp(scratch + 12)
            return (np.float32(1.0) - f32_at(scratch, 3)) / total
        spread = f32_at(scratch, 2) / total
        _log(scratch + 4)
        set_f32(scratch, 3, np.float32(width))
        _log(scratch + 12)
        return np.float32(1.0) - (f32_at(scratch, 1) - spread) / f32_at(scratch, 3)

    return njit(confidence)


@cache
def row_argmax() -> Callable:
    """`argmax(row, width, padded, scratch)`: the first index of the largest; scratch[0] holds the largest then."""
    from numba import njit

    def argmax(row, width, padded, scratch):
        for i in range(width, padded):
            set_f32(row, i, np.float32(LOWEST))
        _largest(row, padded, scratch)
        top = f32_at(scratch, 0)
        for i in range(width):
            if f32_at(row, i) == top:
                return i
        return 0

    return njit(argmax)


def confidence_reference(logits: np.ndarray, criterion: str) -> np.ndarray:
    """float64 [...] of logits [..., V]: largest probability, its distance to the second, or 1 - H / ln V."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    p = np.exp(shifted)
    p /= p.sum(-1, keepdims=True)
    if criterion == "max_prob":
        return p.max(-1)
    if criterion == "margin":
        two = np.partition(p, -2, axis=-1)[..., -2:]
        return two[..., 1] - two[..., 0]
    if criterion == "entropy":
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        return 1 - entropy / np.log(logits.shape[-1])
    raise ValueError(f"criterion {criterion!r}: one of max_prob, margin, entropy")
