"""Structured pruning: what carries nothing can go without a trace, and the least important goes first."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.quantize_file import quantize_gguf
from tests.gguf_factory import write_model

torch = pytest.importorskip("torch")
from edge_runtime.models.recipes import prune  # noqa: E402
from edge_runtime.models.recipes.network_file import load_network_file, write_network_file  # noqa: E402

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROWS = [torch.from_numpy(np.random.default_rng(i).integers(0, 300, 40)) for i in range(3)]


@pytest.fixture(params=ARCHITECTURES)
def path(request, tmp_path):
    return write_model(tmp_path / "m.gguf", architecture=request.param, types="F32", layers=3, heads=6, kv_heads=3,
                       head_size=16, ffn=96)


def network_of(path):
    with GGUFFile(path) as file:
        return load_network_file(file)


@torch.no_grad()
def logits(network):
    return network(ROWS[0][None])[0].numpy()


@torch.no_grad()
def silenced(network, groups: list[int], channels: list[list[int]], layer: int):
    """A copy where some groups' and channels' outputs are zero, and a layer writes nothing."""
    share, D = 2, network.config.head_size
    for number, block in enumerate(network.blocks):
        g = groups[number]
        block.attention.o.weight[:, g * share * D : (g + 1) * share * D] = 0
        block.ffn.down.weight[:, channels[number]] = 0
    network.blocks[layer].attention.o.weight.zero_()
    network.blocks[layer].ffn.down.weight.zero_()
    return network


@pytest.mark.parametrize("method", prune.METHODS)
def test_what_is_zero_goes_without_a_trace(path, method):
    channels = [[1, 5, 7], [0, 2, 95], [10, 20, 30]]
    network = silenced(network_of(path), [0, 2, 1], channels, 1)
    want = logits(network)
    found = prune.measure_importance(network, ROWS, method)
    assert found.groups.shape == (3, 3) and found.channels.shape == (3, 96) and found.layers.shape == (3,)
    assert [int(np.argmin(found.groups[i])) for i in (0, 2)] == [0, 1]
    assert found.groups[0, 0] == 0 and (found.channels[2, channels[2]] == 0).all()
    assert found.layers[1] == pytest.approx(0, abs=1e-6) and (found.layers[[0, 2]] > 1e-3).all()
    short = prune.keep_layers(network, prune.most_important(found.layers, 2))
    np.testing.assert_allclose(logits(short), want, atol=1e-5)
    small = prune.shrink(short, prune.measure_importance(short, ROWS, method), kv_heads=2, ffn=93)
    c = small.config
    assert (c.layers, c.heads, c.kv_heads, c.ffn) == (2, 4, 2, 93)
    assert sum(p.numel() for p in small.parameters()) == c.parameters
    np.testing.assert_allclose(logits(small), want, atol=1e-5)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_a_pruned_network_is_an_ordinary_file(path, tmp_path):
    network = network_of(path)
    small = prune.shrink(network, prune.measure_importance(network, ROWS), kv_heads=1, ffn=64)
    with GGUFFile(path) as source:
        written = write_network_file(tmp_path / "small.gguf", small, source)
    np.testing.assert_allclose(logits(network_of(written)), logits(small), atol=1e-6)


def test_importance_by_gradients_predicts_the_loss(tmp_path):
    """Taking the channels that gradients call useless costs less than taking those they call useful."""
    network = network_of(write_model(tmp_path / "m.gguf", types="F32", ffn=96, scale=2.0))
    found = prune.measure_importance(network, ROWS, "gradients").channels
    want = logits(network)
    error = {}
    for name, order in (("least", found), ("most", -found)):
        kept = [prune.most_important(scores, 64) for scores in order]
        error[name] = np.abs(logits(prune.keep_channels(network, kept)) - want).mean()
    assert error["least"] < 0.7 * error["most"]


def test_curve_and_sizes(path, tmp_path):
    network = network_of(path)
    calls = []

    def recover(student):
        calls.append(student.config.layers)
        return student

    points = prune.curve(network, ROWS[:2], ROWS[2:], [(0, 0, 0), (2, 0, 64), (1, 2, 32)], type="Q8_0", recover=recover)
    assert [(p.layers, p.kv_heads, p.ffn) for p in points] == [(3, 3, 96), (2, 3, 64), (1, 2, 32)]
    assert calls == [3, 2, 1]
    assert points[0].parameters > points[1].parameters > points[2].parameters
    assert points[0].perplexity == pytest.approx(prune.perplexity(network, ROWS[2:])) == points[0].recovered
    written = quantize_gguf(path, tmp_path / "q.gguf", "Q8_0")
    with GGUFFile(written) as file:
        assert points[0].bytes == sum(info.nbytes for info in file.tensors.values())


def test_bad_sizes(path):
    network = network_of(path)
    found = prune.measure_importance(network, ROWS[:1])
    for call, words in ((lambda: prune.shrink(network, found, kv_heads=4), "kv_heads=4: must be 1 to 3"),
                        (lambda: prune.shrink(network, found, ffn=97), "ffn=97"),
                        (lambda: prune.keep_layers(network, [2, 1]), "ascending"),
                        (lambda: prune.keep_layers(network, [0, 3]), "0 to 2"),
                        (lambda: prune.keep_channels(network, [[0], [0, 1], [0]]), "as many in each"),
                        (lambda: prune.measure_importance(network, []), "at least one row"),
                        (lambda: prune.measure_importance(network, ROWS, "luck"), "luck")):
        with pytest.raises(InvalidRequestError, match=words):
            call()


def test_even_layers():
    assert prune.even_layers(12, 4) == [0, 4, 7, 11] and prune.even_layers(5, 1) == [0]
    for layers in range(1, 40):
        for count in range(1, layers + 1):
            assert len(set(prune.even_layers(layers, count))) == count
