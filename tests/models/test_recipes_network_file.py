"""Files through the torch network: the reference's logits, and the same weights back in a file."""
from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from edge_runtime.errors import UnsupportedModelError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.gguf_factory import LLAMA3_ROPE, write_model

torch = pytest.importorskip("torch")
from edge_runtime.models.recipes.config import network_from_json  # noqa: E402
from edge_runtime.models.recipes.network_file import load_network_file, write_network_file  # noqa: E402

YARN = {"theta": 10000.0, "yarn": {"factor": 4.0, "original_context": 64}}
CASES = {
    "llama": {},
    "llama untied": {"tied": False},
    "llama biases": {"qkv_bias": True},
    "llama linear": {"rope": {"theta": 5000.0, "linear": 4.0}},
    "llama 3 factors": {"rope": LLAMA3_ROPE, "head_size": 32},
    "llama yarn": {"rope": YARN, "head_size": 32},
    "qwen2": {"architecture": "qwen2"},
    "qwen2 untied yarn": {"architecture": "qwen2", "tied": False, "rope": YARN, "head_size": 32},
    "qwen3": {"architecture": "qwen3", "head_size": 32},
    "quantized": {"types": "Q4_0"},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_the_way_back(tmp_path, name):
    path = write_model(tmp_path / "m.gguf", **{"types": "F32", "context_length": 300, **CASES[name]})
    ids = np.random.default_rng(0).integers(0, 300, 120)
    with GGUFFile(path) as file:
        want = ReferenceModel.load(file).forward(ids)
        network = load_network_file(file)
        with torch.no_grad():
            got = network(torch.from_numpy(ids)[None])[0].numpy()
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
        assert network_from_json(json.loads(json.dumps(asdict(network.config)))) == network.config
        assert sum(p.numel() for p in network.parameters()) == network.config.parameters
        back = write_network_file(tmp_path / "back.gguf", network, file, name="copy", exit_layers=[1])
        with GGUFFile(back) as copy:
            config = config_from_gguf(copy)
            assert (config.name, config.exit_layers) == ("copy", (1,))
            assert config.rope == config_from_gguf(file).rope
            for tensor in file.tensors:
                np.testing.assert_array_equal(copy.floats(tensor), file.floats(tensor))
            assert copy.metadata["tokenizer.ggml.tokens"] == file.metadata["tokenizer.ggml.tokens"]
            np.testing.assert_array_equal(ReferenceModel.load(copy).forward(ids), want)


def test_a_row_longer_than_the_first_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.models.recipes.network.TABLE_LENGTH", 16)
    with GGUFFile(write_model(tmp_path / "m.gguf", types="F32")) as file:
        network, ids = load_network_file(file), np.arange(40)
        with torch.no_grad():
            got = network(torch.from_numpy(ids)[None])[0].numpy()
        np.testing.assert_allclose(got, ReferenceModel.load(file).forward(ids), atol=1e-4)


def test_another_models_tokenizer_is_refused(tmp_path):
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", vocab=400)
    with GGUFFile(a) as file, GGUFFile(b) as other, pytest.raises(UnsupportedModelError, match=r"300 tokens.*400"):
        write_network_file(tmp_path / "c.gguf", load_network_file(file), other)
