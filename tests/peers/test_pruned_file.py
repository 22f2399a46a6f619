"""A pruned network with exits is a file that llama.cpp loads, with the same logits."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.gguf_factory import write_model

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits(tmp_path, architecture):
    from edge_runtime.models.recipes.network_file import load_network_file, write_network_file
    from edge_runtime.models.recipes.prune import keep_layers, measure_importance, shrink
    from tests.peers.llama_cpp_model import llama_cpp_logits

    # llama.cpp wants heads * head_size == width of qwen2, so its heads stay
    kv_heads = 0 if architecture == "qwen2" else 1
    path = write_model(tmp_path / "m.gguf", architecture=architecture, types="F32", layers=4, width=128, heads=4,
                       kv_heads=2, ffn=192)
    ids = np.random.default_rng(0).integers(0, 300, 80)
    with GGUFFile(path) as file:
        network = keep_layers(load_network_file(file), [0, 1, 3])
        small = shrink(network, measure_importance(network, [torch.from_numpy(ids)]), kv_heads=kv_heads, ffn=96)
        written = write_network_file(tmp_path / "small.gguf", small, file, exit_layers=[1, 2])
    with torch.no_grad():
        wanted = small(torch.from_numpy(ids)[None])[0].numpy()
    with GGUFFile(written) as file:
        np.testing.assert_allclose(ReferenceModel.load(file).forward(ids), wanted, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(llama_cpp_logits(written, ids), wanted, atol=1e-3 * np.abs(wanted).max())
