"""Quantizers: bytes equal to the gguf package's where it has them, errors bounded, importance heeded, edges refused."""
from __future__ import annotations

import time

import gguf
import gguf.quants
import numpy as np
import pytest

from edge_runtime.quant.dequantize import dequantize
from edge_runtime.quant.formats import FORMATS, block_format
from edge_runtime.quant.mixtures import FILE_TYPES, file_type, fitting_format, mixed_format
from edge_runtime.quant.quantize import quantize

QUANTIZED = [name for name, format in FORMATS.items() if not format.is_float]
SEARCHED = [(name, how) for name in QUANTIZED for how in ("plain", "search") if how == "search" or name[-1] != "K"]


def samples(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "normal": 0.02 * rng.standard_normal((64, 512), np.float32),
        "heavy tails": (0.01 * rng.standard_t(3, (64, 512))).astype(np.float32),
        "shifted": (0.02 * rng.standard_normal((64, 512)) + 0.05).astype(np.float32),
        "negative": -np.abs(0.02 * rng.standard_normal((64, 512), np.float32)),
        "sparse": np.where(rng.random((64, 512)) < 0.02, rng.standard_normal((64, 512)), 0).astype(np.float32),
    }


def error(weights: np.ndarray, name: str, by: np.ndarray | float = 1.0, **options) -> float:
    back = dequantize(quantize(weights, name, **options), name, weights.shape)
    return float((by * (back - weights).astype(np.float64) ** 2).mean())


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_plain_bytes_are_those_of_gguf(name):
    for kind, weights in samples().items():
        theirs = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name]).view(np.uint8)
        ours = quantize(weights, name, method="plain")
        assert ours.shape == (64, FORMATS[name].row_bytes(512)), kind
        np.testing.assert_array_equal(ours, theirs.reshape(ours.shape), err_msg=kind)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_round_trip(name):
    weights = np.arange(-64, 64, dtype=np.float32).reshape(2, 64) / 8
    np.testing.assert_array_equal(dequantize(quantize(weights, name), name, weights.shape), weights)


@pytest.mark.parametrize("name, method", SEARCHED)
def test_error_is_within_the_step(name, method):
    """No weight is further off than a step of the plain quantizer of its block, or a few where scales are searched."""
    levels = FORMATS[name].levels
    for kind, weights in samples().items():
        back = dequantize(quantize(weights, name, method=method), name, weights.shape)
        blocks = weights.reshape(-1, FORMATS[name].block_size)
        reach = 2 * np.abs(blocks).max(axis=1, keepdims=True)
        off = np.abs(back.reshape(blocks.shape) - blocks) / np.maximum(reach, 1e-30)
        assert off.max() < (4.0 if method == "search" else 1.1) / levels, (kind, off.max() * levels)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_search_is_never_worse_than_plain(name):
    for kind, weights in samples().items():
        assert error(weights, name, method="search") <= error(weights, name, method="plain") * 1.0001, kind
    gain = error(samples()["normal"], name, method="search") / error(samples()["normal"], name, method="plain")
    assert gain < 0.92


def test_more_bits_are_better():
    weights = samples()["normal"]
    errors = [error(weights, name, method="search") for name in ("Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_lowers_the_weighted_error(name):
    rng = np.random.default_rng(3)
    weights = samples()["normal"]
    importance = rng.lognormal(0, 2, 512).astype(np.float32)
    heeded = error(weights, name, by=importance, importance=importance)
    assert heeded < 0.97 * error(weights, name, by=importance, method="search")
    full = np.broadcast_to(importance, weights.shape).copy()
    np.testing.assert_array_equal(quantize(weights, name, full), quantize(weights, name, importance))


@pytest.mark.parametrize("name, method", SEARCHED)
def test_extremes(name, method):
    width = 256
    zero = np.zeros((2, width), np.float32)
    np.testing.assert_array_equal(dequantize(quantize(zero, name, method=method), name, zero.shape), zero)
    for value in (1.0, -1.0, 1e-7, -1e-7, 1000.0):
        flat = np.full((1, width), value, np.float32)
        back = dequantize(quantize(flat, name, method=method), name, flat.shape)
        np.testing.assert_allclose(back, flat, rtol=0.02, atol=4e-7)
    one = zero.copy()
    one[0, 7] = -3.0
    back = dequantize(quantize(one, name, method=method), name, one.shape)
    assert back[0, 7] == pytest.approx(-3.0, rel=0.02) and np.abs(np.delete(back[0], 7)).max() < 0.06
    for tiny in (1e-38, 1e-45):
        assert np.isfinite(dequantize(quantize(zero + np.float32(tiny), name, method=method), name, zero.shape)).all()
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(np.where(np.arange(width) == 3, np.float32(wrong), zero), name, method=method)
    with pytest.raises(ValueError, match="f16"):
        quantize(np.where(np.arange(width) % 2, np.float32(1e9), np.float32(-1e9))[None], name, method=method)


def test_what_is_refused():
    weights = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="multiple"):
        quantize(weights[:, :33], "Q4_0")
    with pytest.raises(ValueError, match="method="):
        quantize(weights, "Q4_0", method="best")
    with pytest.raises(ValueError, match="shape"):
        quantize(weights, "Q4_0", np.ones(32, np.float32))
    with pytest.raises(ValueError, match="takes no importance"):
        quantize(weights, "Q4_0", np.ones(64, np.float32), "plain")
    with pytest.raises(ValueError, match="not negative"):
        quantize(weights, "Q4_0", np.full(64, -1, np.float32))
    with pytest.raises(ValueError, match="f16"):
        quantize(weights + 1e6, "F16")
    with pytest.raises(ValueError, match="bf16"):
        quantize(np.full((1, 4), 3.4028e38, np.float32), "BF16")
    assert quantize(weights, "Q4_0", np.zeros(64, np.float32)).shape == (2, 36)


def test_deterministic_and_independent_of_chunks(monkeypatch):
    weights = samples()["normal"]
    whole = quantize(weights, "Q4_K")
    monkeypatch.setattr("edge_runtime.quant.quantize.CHUNK_WEIGHTS", 1024)
    np.testing.assert_array_equal(quantize(weights, "Q4_K"), whole)
    importance = np.linspace(0.1, 3, 512).astype(np.float32)
    chunked = quantize(weights, "Q5_1", importance)
    monkeypatch.undo()
    np.testing.assert_array_equal(quantize(weights, "Q5_1", importance), chunked)


def test_million_weights_take_a_second_at_most():
    weights = 0.02 * np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    for name in ("Q4_0", "Q4_K", "Q6_K"):
        start = time.perf_counter()
        quantize(weights, name, method="auto")
        assert time.perf_counter() - start < 2.0, name


def test_mixtures():
    assert file_type("q4_k") == FILE_TYPES["Q4_K_M"] and file_type("Q8_0").number == 7

    def mixed(kind: str, name: str, layer: int, inputs: int = 256, head: bool = False) -> str:
        return mixed_format(file_type(kind), name, layer, 16, inputs, head).name

    assert mixed("Q4_K_M", "blk.0.attn_v.weight", 0) == "Q6_K" and mixed("Q4_K_M", "blk.2.attn_v.weight", 2) == "Q4_K"
    assert mixed("Q4_K_S", "blk.3.attn_v.weight", 3) == "Q5_K" and mixed("Q4_K_S", "blk.4.ffn_down.weight", 4) == "Q4_K"
    assert mixed("Q4_0", "output.weight", -1, head=True) == "Q6_K"
    assert mixed("Q8_0", "output.weight", -1, head=True) == "Q8_0"
    assert mixed("Q4_K_M", "blk.2.attn_q.weight", 2, inputs=96) == "Q5_0"
    assert [fitting_format(n, 96).name for n in ("Q4_K", "Q5_K", "Q6_K", "Q4_0")] == ["Q5_0", "Q5_1", "Q8_0", "Q4_0"]
    assert fitting_format("Q4_K", 100).name == "F16" and block_format("F32").block_size == 1
