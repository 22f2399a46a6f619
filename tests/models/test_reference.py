"""The forward pass against sums written out by hand, and its own invariants."""
from __future__ import annotations

import math

import numpy as np
import pytest

from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel, rms_norm, silu, softmax
from tests.gguf_factory import LLAMA3_ROPE, write_model

MODELS = {
    "llama": {"architecture": "llama", "rope": LLAMA3_ROPE},
    "qwen2": {"architecture": "qwen2", "heads": 7, "kv_heads": 1, "width": 56, "ffn": 96, "types": "F16"},
    "qwen3": {"architecture": "qwen3", "head_size": 32, "tied": False, "types": "Q8_0"},
}


def load(tmp_path, **options) -> ReferenceModel:
    with GGUFFile(write_model(tmp_path / "m.gguf", **options)) as file:
        return ReferenceModel.load(file)


@pytest.mark.parametrize("name", MODELS)
def test_causal_and_shapes(tmp_path, name):
    model = load(tmp_path, **MODELS[name])
    c = model.config
    ids = np.random.default_rng(0).integers(0, c.vocab_size, 20)
    trace = model.trace(ids)
    assert trace.logits.shape == (20, c.vocab_size) and trace.logits.dtype == np.float32
    assert trace.hidden.shape == (c.layers + 1, 20, c.width) and trace.hidden.dtype == np.float32
    assert trace.keys.shape == trace.values.shape == (c.layers, 20, c.kv_heads, c.head_size)
    np.testing.assert_allclose(model.forward(ids[:7]), trace.logits[:7], atol=1e-4)
    changed = ids.copy()
    changed[10] = (changed[10] + 1) % c.vocab_size
    other = model.forward(changed)
    np.testing.assert_allclose(other[:10], trace.logits[:10], atol=1e-4)
    assert np.abs(other[10:] - trace.logits[10:]).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_only_relative_positions_matter(tmp_path, name):
    model = load(tmp_path, **MODELS[name])
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 12)
    np.testing.assert_allclose(model.forward(ids, np.arange(12) + 500), model.forward(ids), atol=2e-3)
    spread = model.forward(ids, np.arange(12) * 3)
    assert np.abs(spread - model.forward(ids)).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_one_token_by_scalar_sums(tmp_path, name):
    """The first token attends to itself alone: its output is o @ v, whatever q, k and RoPE are."""
    model = load(tmp_path, layers=1, **MODELS[name])
    c, layer = model.config, model.layers[0]
    norm = lambda x, w: [a / math.sqrt(sum(b * b for b in x) / len(x) + c.rms_eps) * g for a, g in zip(x, w)]
    apply = lambda m, x: [sum(a * b for a, b in zip(row, x)) for row in m.tolist()]
    x = model.embedding[5].tolist()
    v = apply(layer.v, norm(x, layer.attn_norm))
    if layer.v_bias is not None:
        v = [a + b for a, b in zip(v, layer.v_bias)]
    heads = [value for h in range(c.heads) for value in v[h // c.group * c.head_size :][: c.head_size]]
    x = [a + b for a, b in zip(x, apply(layer.o, heads))]
    y = norm(x, layer.ffn_norm)
    gate = [g / (1 + math.exp(-g)) for g in apply(layer.gate, y)]
    x = [a + b for a, b in zip(x, apply(layer.down, [g * u for g, u in zip(gate, apply(layer.up, y))]))]
    np.testing.assert_allclose(model.forward([5])[0], apply(model.head, norm(x, model.output_norm)), atol=1e-4)


def test_rotation_styles(tmp_path):
    for architecture, pairs in (("llama", lambda n: (2 * n, 2 * n + 1)), ("qwen3", lambda n: (n, n + 8))):
        model = load(tmp_path, architecture=architecture, head_size=16)
        x = np.random.default_rng(2).standard_normal((3, 2, 16), np.float32)
        positions = np.array([0, 5, 1000])
        turned = model.rotate(x, positions)
        for n in range(8):
            a, b = pairs(n)
            angle = positions[:, None] * float(model.inverse_frequencies[n])
            np.testing.assert_allclose(turned[..., a], x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(turned[..., b], x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle), atol=1e-5)


def test_early_exit_stops_after_layers(tmp_path):
    model = load(tmp_path, layers=3)
    trace, early = model.trace([1, 2, 3]), model.trace([1, 2, 3], layers=2)
    np.testing.assert_array_equal(early.hidden, trace.hidden[:3])
    expected = rms_norm(trace.hidden[2], model.output_norm, model.config.rms_eps) @ model.head.T
    np.testing.assert_allclose(early.logits, expected, atol=1e-5)


def test_token_outside_the_vocabulary(tmp_path):
    model = load(tmp_path)
    for wrong in (-1, 300):
        with pytest.raises(IndexError, match="within 0 and 299"):
            model.forward([1, wrong])


def test_functions_at_extremes():
    x = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], np.float32)
    assert np.isfinite(silu(x)).all() and silu(x)[-1] == 1e4 and abs(silu(x)[0]) < 1e-6
    assert softmax(x).tolist()[-1] == 1.0
    np.testing.assert_allclose(rms_norm(np.full((1, 4), 3, np.float32), np.ones(4, np.float32), 0.0), 1.0)
