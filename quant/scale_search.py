"""Scales, minima and codes of small groups of weights, chosen to minimize the weighted squared error.

The method is the one of k-quants: try a grid of scales around the plain one, solve the weighted least squares for scale
(and minimum) given the codes of each, keep the best, and polish it by alternating codes and least squares. All groups
of a chunk go through each step together.

Shapes: N groups, n weights of a group. x and weights are float32 [N, n]; weights are not negative.
"""
from __future__ import annotations

import numpy as np

POLISH_ROUNDS = 3  # a fourth lowers the error by less than 0.01 %
TINY = 1e-30


def search_scale_min(x: np.ndarray, weights: np.ndarray, levels: int, steps: np.ndarray,
                     minimum_is_negative: bool = True) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Scale and minimum for `x ~ scale * code + minimum`, codes 0 to levels - 1. float32 [N] each.

    steps: offsets tried on the number of levels that span the group's range. minimum_is_negative: only minima up to 0
    can be stored.
    """
    top = np.float32(levels - 1)
    low, high = x.min(axis=1), x.max(axis=1)
    if minimum_is_negative:
        low = np.minimum(low, 0)
    span = np.maximum(high - low, TINY).astype(np.float32)
    sum_w = weights.sum(axis=1, dtype=np.float64)
    wx = weights * x
    sum_wx = wx.sum(axis=1, dtype=np.float64)
    best_gain = np.full(len(x), -np.inf)
    scale, minimum = (span / top).astype(np.float32), low.astype(np.float32)
    shifted = x - low[:, None]

    def consider(codes: np.ndarray) -> None:
        nonlocal best_gain, scale, minimum
        new_scale, new_minimum, gain = _fit(codes, weights, wx, sum_w, sum_wx, minimum_is_negative)
        better = gain > best_gain
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
        best_gain = np.where(better, gain, best_gain)

    for step in steps:
        inverse = ((top + np.float32(step)) / span)[:, None]
        consider(np.clip(np.rint(shifted * inverse), 0, top))
    for _ in range(POLISH_ROUNDS):
        inverse = _inverse(scale)[:, None]
        consider(np.clip(np.rint((x - minimum[:, None]) * inverse), 0, top))
    return scale, minimum


def _fit(codes: np.ndarray, weights: np.ndarray, wx: np.ndarray, sum_w: np.ndarray, sum_wx: np.ndarray,
         minimum_is_negative: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Least squares of scale and minimum for given codes, and the gain: sum of w x^2 less the error that is left."""
    wl = weights * codes
    sum_l = wl.sum(axis=1, dtype=np.float64)
    sum_l2 = np.einsum("ij,ij->i", wl, codes).astype(np.float64)
    sum_xl = np.einsum("ij,ij->i", wx, codes).astype(np.float64)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    safe = np.maximum(determinant, TINY)
    scale = (sum_w * sum_xl - sum_wx * sum_l) / safe
    minimum = (sum_l2 * sum_wx - sum_l * sum_xl) / safe
    if minimum_is_negative:
        through_zero = minimum > 0
        scale = np.where(through_zero, sum_xl / np.maximum(sum_l2, TINY), scale)
        minimum = np.where(through_zero, 0, minimum)
    error = (scale * scale * sum_l2 + minimum * minimum * sum_w
             + 2 * (scale * minimum * sum_l - scale * sum_xl - minimum * sum_wx))  # fmt: skip
    gain = np.where((determinant > TINY) & (scale > 0), -error, -np.inf)
    return scale.astype(np.float32), minimum.astype(np.float32), gain


def search_scale(x: np.ndarray, weights: np.ndarray, low: int, high: int, steps: np.ndarray) -> np.ndarray:
    """Scale for `x ~ scale * code`, codes `low` (negative) to `high`. float32 [N].

    steps: offsets tried on the code that the weight of largest magnitude gets.

    The scale may be negative, so that the weight of largest magnitude can take the one code more on the negative side.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    wx = weights * x
    scale = (peak / np.float32(low)).astype(np.float32)
    best_gain = np.full(len(x), -np.inf)

    def consider(codes: np.ndarray) -> None:
        nonlocal scale, best_gain
        sum_xl = np.einsum("ij,ij->i", wx, codes).astype(np.float64)
        sum_l2 = np.einsum("ij,ij,ij->i", weights, codes, codes).astype(np.float64)
        fits = sum_l2 > TINY
        gain = np.where(fits, sum_xl * sum_xl / np.maximum(sum_l2, TINY), -np.inf)
        better = gain > best_gain
        scale = np.where(better, sum_xl / np.maximum(sum_l2, TINY), scale).astype(np.float32)
        best_gain = np.where(better, gain, best_gain)

    for end in (low, high):  # the peak at the one end of the codes, then at the other
        for step in steps:
            inverse = np.float32(end + np.sign(end) * step) * _inverse(peak)
            consider(np.clip(np.rint(x * inverse[:, None]), low, high))
    for _ in range(POLISH_ROUNDS):
        consider(np.clip(np.rint(x * _inverse(scale)[:, None]), low, high))
    return scale


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 where x is too small to have one."""
    usable = np.abs(x) > TINY
    return np.where(usable, 1 / np.where(usable, x, 1), 0).astype(np.float32)
