"""Hugging Face folders: what they say becomes a GGUF file's, and what breaks them is named."""
from __future__ import annotations

import json

import numpy as np
import pytest

from edge_runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from edge_runtime.models.config import config_from_gguf, rope_factors
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.hf_config import read_hf_config
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.models.rope import halves_from_pairs, pairs_from_halves
from edge_runtime.models.safetensors_file import SafetensorsFolder
from edge_runtime.models.safetensors_model import write_folder
from tests.gguf_factory import llama3_factors
from tests.hf_factory import hf_config, hf_weights, safetensors_bytes, write_hf_folder

KINDS = ("llama", "mistral", "qwen2", "qwen3")
NO_TOKENIZER: dict = {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_and_sizes(tmp_path, kind, dtype):
    config = hf_config(model_type=kind, head_dim=16, tie_word_embeddings=kind == "qwen3")
    weights = hf_weights(config)
    folder = write_hf_folder(tmp_path / "hf", config=config, weights=weights, dtype=dtype, shards=3)
    seen: list[tuple[int, int]] = []
    written = write_folder(folder, tmp_path / "m.gguf", NO_TOKENIZER, lambda *at: seen.append(at))
    total = sum(weight.size for weight in weights.values())
    assert seen[-1] == (total, total)
    with GGUFFile(written) as file, SafetensorsFolder(folder) as stored:
        found = config_from_gguf(file)
        assert found.architecture == ("llama" if kind == "mistral" else kind) and found.name == "hf"
        assert (found.layers, found.width, found.heads, found.kv_heads, found.head_size, found.ffn, found.vocab_size,
                found.context_length, found.rms_eps) == (2, 32, 4, 2, 16, 48, 320, 256, pytest.approx(1e-5))
        assert (found.qkv_bias, found.qk_norm, found.tied_head) == (kind == "qwen2", kind == "qwen3", kind == "qwen3")
        assert file.tensors["blk.0.ffn_up.weight"].type == dtype
        assert file.tensors["blk.0.attn_norm.weight"].type == "F32"
        q = file.floats("blk.1.attn_q.weight")
        if found.architecture == "llama":
            q = halves_from_pairs(q, 4)
        np.testing.assert_array_equal(q, stored.floats("model.layers.1.self_attn.q_proj.weight"))
        np.testing.assert_array_equal(file.floats("blk.1.ffn_down.weight"),
                                      stored.floats("model.layers.1.mlp.down_proj.weight"))
        np.testing.assert_allclose(file.floats("output_norm.weight"), weights["model.norm.weight"], rtol=1e-2)
        assert np.isfinite(ReferenceModel.load(file).forward([1, 2, 3])).all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_that_does_not_say_whether_the_head_is_tied(tmp_path, tied):
    config = hf_config(tie_word_embeddings=tied)
    weights = hf_weights(config)
    del config["tie_word_embeddings"]
    folder = write_hf_folder(tmp_path / "hf", config=config, weights=weights)
    with GGUFFile(write_folder(folder, tmp_path / "m.gguf", NO_TOKENIZER)) as file:
        assert config_from_gguf(file).tied_head == tied


def test_rows_in_pairs_and_back():
    rows = np.arange(48).reshape(24, 2)
    np.testing.assert_array_equal(halves_from_pairs(pairs_from_halves(rows, 3), 3), rows)
    assert pairs_from_halves(np.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_scaling(tmp_path, place):
    def read(name: str, **rope):
        theta = rope if place == "rope_parameters" else {}
        theta |= {"rope_theta": 5000.0}
        config = hf_config(head_dim=64, **{place: rope}) | ({} if place == "rope_parameters" else theta)
        folder = write_hf_folder(tmp_path / name, config=config)
        with GGUFFile(write_folder(folder, tmp_path / f"{name}.gguf", NO_TOKENIZER)) as file:
            found = config_from_gguf(file)
            return found.rope, rope_factors(file, found)

    assert read("default", rope_type="default")[0].scaling == "none"
    rope, _ = read("linear", type="linear", factor=4.0)
    assert (rope.scaling, rope.factor, rope.theta) == ("linear", 4.0, 5000.0)
    rope, _ = read("yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0)
    assert (rope.scaling, rope.factor, rope.original_context, rope.beta_fast) == ("yarn", 4.0, 64, 16.0)
    assert rope.attn_factor == pytest.approx(1)
    rope, _ = read("flat", rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.0)
    assert rope.attn_factor == pytest.approx(1 / (1 + 0.1 * np.log(4)))
    rope, factors = read("llama3", rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position_embeddings=64)
    assert rope.scaling == "llama3"
    np.testing.assert_allclose(factors, llama3_factors(64, 5000.0, 8.0, 1.0, 4.0, 64), rtol=1e-6)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "gemma2"}, "gemma2"), ({"model_type": None}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"), ({"hidden_act": "gelu"}, "gelu"),
    ({"mlp_bias": True}, "mlp_bias"), ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"model_type": "mistral", "sliding_window": 64}, "sliding window of 64"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding window"),
    ({"partial_rotary_factor": 0.5}, "0.5 of a head"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncation"),
])
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, words):
    folder = write_hf_folder(tmp_path, config=hf_config(**changes), weights=hf_weights(hf_config()))
    with pytest.raises(UnsupportedModelError, match=words):
        write_folder(folder, tmp_path / "m.gguf", NO_TOKENIZER)
    assert not (tmp_path / "m.gguf").exists()


def test_a_window_that_is_off_or_wide_is_fine(tmp_path):
    for number, changes in enumerate(({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64},
                                      {"model_type": "mistral", "sliding_window": 4096},
                                      {"model_type": "mistral", "sliding_window": None})):
        read_hf_config(write_hf_folder(tmp_path / str(number), config=hf_config(**changes)))


@pytest.mark.parametrize("changes, words", [
    ({"hidden_size": None}, "hidden_size is missing"), ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps"), ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"vocab_size": 321}, "shape"),
    ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing and 8"),
    ({"num_key_value_heads": 3}, "cannot share"), ({"head_dim": 7}, "even head size"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
    ({"rope_scaling": 7}, "rope_parameters"), ({"intermediate_size": 47}, "shape")])
def test_a_broken_config(tmp_path, changes, words):
    folder = write_hf_folder(tmp_path, config=hf_config(**changes), weights=hf_weights(hf_config()))
    with pytest.raises(CorruptModelError, match=words):
        write_folder(folder, tmp_path / "m.gguf", NO_TOKENIZER)


def test_tensors_that_would_be_left_out(tmp_path):
    weights = hf_weights(hf_config()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
                                         "model.layers.0.self_attn.o_proj.bias": np.zeros(32, np.float32)}
    folder = write_hf_folder(tmp_path / "fine", weights=weights)
    write_folder(folder, tmp_path / "m.gguf", NO_TOKENIZER)
    weights["model.layers.0.self_attn.o_proj.bias"][3] = 1
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.bias"):
        write_folder(write_hf_folder(tmp_path / "not", weights=weights), tmp_path / "m.gguf", NO_TOKENIZER)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        SafetensorsFolder(tmp_path / "x")
    with pytest.raises(ModelNotFoundError, match="neither"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match="PyTorch"):
        SafetensorsFolder(tmp_path)


def test_broken_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    good = safetensors_bytes({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)})
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def with_header(values: object) -> bytes:
        text = values if isinstance(values, bytes) else json.dumps(values).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    entry = header["b"]
    cases = {
        "of 0 bytes": b"", "of 5 bytes": b"short", "a header of": (1 << 40).to_bytes(8, "little") + good[8:],
        "not JSON": with_header(b"{"), "not an object": with_header([]), "after the file": good[:-1],
        "the shape": with_header({**header, "b": {**entry, "shape": [-2]}}),
        "bytes for F32": with_header({**header, "b": {**entry, "shape": [3]}}),
        "before it begins": with_header({**header, "b": {**entry, "data_offsets": [8, 0]}}),
        "no type": with_header({**header, "b": {**entry, "dtype": 3}}),
        "no object": with_header({**header, "b": 3}),
    }
    for words, raw in cases.items():
        path.write_bytes(raw)
        with pytest.raises(CorruptModelError, match=words) as caught:
            SafetensorsFolder(tmp_path)
        assert caught.value.offset in (0, 8)
    path.write_bytes(with_header({**header, "b": {"dtype": "I8", "shape": [8], "data_offsets": [24, 32]}}))
    with SafetensorsFolder(tmp_path) as files, pytest.raises(UnsupportedModelError, match="the type I8"):
        files.raw("b")


def test_random_damage_never_escapes(tmp_path):
    good = safetensors_bytes({"a": np.ones((4, 5), np.float32), "b": np.ones(3, np.float32)}, "BF16")
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(300):
        raw = bytearray(good)
        for at in rng.integers(0, len(raw), rng.integers(1, 6)):
            raw[at] = rng.integers(256)
        (tmp_path / "model.safetensors").write_bytes(raw[: rng.integers(1, len(raw) + 1)])
        try:
            with SafetensorsFolder(tmp_path) as files:
                for name in files.tensors:
                    files.floats(name)
        except (CorruptModelError, UnsupportedModelError):
            pass


def test_a_broken_index(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", shards=2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    outside = {"weight_map": {"a": "../a.safetensors"}}
    for values, words in (({"weight_map": {}}, "no weight_map"), (outside, "no file of"),
                          ({"weight_map": {**places, "x": places["model.norm.weight"]}}, "'x'"),
                          ({"weight_map": {**places, "x": "gone.safetensors"}}, "missing"), ([], "object should be")):
        index.write_text(json.dumps(values))
        with pytest.raises(CorruptModelError, match=words):
            SafetensorsFolder(folder)
    index.write_bytes(b"\xff")
    with pytest.raises(CorruptModelError, match="UTF-8"):
        SafetensorsFolder(folder)
