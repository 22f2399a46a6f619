"""Rotary position embedding: its parameters, and the angles per position they give."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SCALINGS = ("none", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """theta: base of the frequencies. dimension_count: rotated values of a head, all of them in these architectures.

    style: "norm" rotates the pairs (0, 1), (2, 3) ..., "neox" the pairs (0, n/2), (1, n/2 + 1) ...
    scaling: "linear" divides positions by `factor`; "yarn" (https://arxiv.org/abs/2309.00071) divides those of slow
    frequencies only, between `beta_fast` and `beta_slow` rotations over `original_context` tokens, with strength
    `ext_factor`; "llama3" means that the file carries a divisor per frequency, `rope_freqs.weight`.
    attn_factor: multiplies cosine and sine.
    """

    theta: float
    dimension_count: int
    style: str
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def rope_inverse_frequencies(rope: RopeConfig, factors: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, float32 [dimension_count / 2], and the factor on cosine and sine.

    factors: `rope_freqs.weight`, float32 [dimension_count / 2], divides the frequencies. The results are those of
    llama.cpp (ggml `rope_yarn`; YaRN's magnitude correction 1 + ln(factor) / 10 included).
    """
    pairs = rope.dimension_count // 2
    frequencies = rope.theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if factors is not None:
        if factors.shape != (pairs,):
            raise ValueError(f"{factors.shape} rope factors for {pairs} frequencies")
        frequencies = frequencies / factors.astype(np.float64)
    attention_scale = rope.attn_factor
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "yarn":
        kept = _yarn_kept(rope) * rope.ext_factor
        frequencies = frequencies * ((1 - kept) / rope.factor + kept)
        if rope.ext_factor != 0 and rope.factor > 1:
            attention_scale *= 1 + 0.1 * math.log(rope.factor)
    return frequencies.astype(np.float32), float(attention_scale)


def _yarn_kept(rope: RopeConfig) -> np.ndarray:
    """How far each frequency keeps its own pace: 1 for those that turn often within the original context, 0 for
    those that turn less than once, a ramp between them."""
    low = max(0.0, math.floor(_pair_of_rotations(rope, rope.beta_fast)))
    high = min(rope.dimension_count - 1.0, math.ceil(_pair_of_rotations(rope, rope.beta_slow)))
    pairs = np.arange(rope.dimension_count // 2, dtype=np.float64)
    return 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)


def _pair_of_rotations(rope: RopeConfig, rotations: float) -> float:
    """The (fractional) pair whose angle turns `rotations` times over the original context."""
    turns = rope.original_context / (rotations * 2 * math.pi)
    return rope.dimension_count * math.log(turns) / (2 * math.log(rope.theta))


def pairs_from_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * D, ...] from the order that rotates halves (value i with i + D/2, the "neox" style) to
    the one that rotates neighbours (2i with 2i + 1, "norm")."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `pairs_from_halves`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
