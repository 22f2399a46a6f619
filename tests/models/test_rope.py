"""RoPE frequencies against the formulas of their papers."""
from __future__ import annotations

import math

import numpy as np
import pytest

from edge_runtime.models.rope import RopeConfig, rope_inverse_frequencies


def plain(theta: float, dims: int) -> np.ndarray:
    return np.array([theta ** (-2 * i / dims) for i in range(dims // 2)])


def test_plain():
    frequencies, scale = rope_inverse_frequencies(RopeConfig(10000.0, 128, "norm"))
    assert frequencies.dtype == np.float32 and frequencies.shape == (64,) and scale == 1.0
    np.testing.assert_allclose(frequencies, plain(10000.0, 128), rtol=1e-6)


def test_linear_and_factors():
    rope = RopeConfig(500000.0, 64, "norm", "linear", factor=8.0, attn_factor=1.25)
    factors = np.linspace(1, 8, 32).astype(np.float32)
    frequencies, scale = rope_inverse_frequencies(rope, factors)
    np.testing.assert_allclose(frequencies, plain(500000.0, 64) / 8 / factors, rtol=1e-6)
    assert scale == 1.25
    with pytest.raises(ValueError, match="31"):
        rope_inverse_frequencies(rope, factors[:31])


def test_yarn():
    """Pairs that turn more than beta_fast times within the original context keep their pace, those that turn less than
    beta_slow times are slowed by the factor, with a straight ramp between."""
    theta, dims, factor, original = 1e6, 128, 4.0, 32768
    frequencies, scale = rope_inverse_frequencies(RopeConfig(theta, dims, "neox", "yarn", factor, original))
    base = plain(theta, dims)
    pair = lambda turns: dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = math.floor(pair(32)), math.ceil(pair(1))
    for i in range(dims // 2):
        slowed = min(1.0, max(0.0, (i - low) / (high - low)))
        assert frequencies[i] == pytest.approx(base[i] * (slowed / factor + 1 - slowed), rel=1e-6)
    assert frequencies[0] == 1.0 and frequencies[-1] == pytest.approx(base[-1] / factor)
    assert scale == pytest.approx(1 + 0.1 * math.log(factor))


def test_yarn_edges():
    assert rope_inverse_frequencies(RopeConfig(1e4, 64, "neox", "yarn", 1.0, 2048))[1] == 1.0
    off, scale = rope_inverse_frequencies(RopeConfig(1e4, 64, "neox", "yarn", 4.0, 2048, ext_factor=0.0))
    np.testing.assert_allclose(off, plain(1e4, 64) / 4, rtol=1e-6)
    assert scale == 1.0
    tiny, _ = rope_inverse_frequencies(RopeConfig(1e4, 2, "neox", "yarn", 4.0, 1))
    assert np.isfinite(tiny).all()
