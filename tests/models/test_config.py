"""Configuration: read from good files, refused from bad ones with the key and its place named."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import CorruptModelError, UnsupportedModelError
from edge_runtime.models.config import ModelConfig, config_from_gguf, rope_factors
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.gguf_writer import RawValue, TensorSource, array_tensor, write_gguf
from edge_runtime.models.rope import RopeConfig
from tests.gguf_factory import LLAMA3_ROPE, llama3_factors, write_model


def config_of(path: Path) -> ModelConfig:
    with GGUFFile(path) as file:
        return config_from_gguf(file)


def rewritten(path: Path, metadata: dict | None = None, drop: tuple[str, ...] = (),
              tensors: dict | None = None) -> Path:  # fmt: skip
    """The file with metadata replaced, keys and tensors dropped, and float32 tensors replaced or added."""
    with GGUFFile(path) as file:
        pairs = {key: RawValue(file.metadata.raw(key)) for key in file.metadata if key not in drop}
        sources = [
            TensorSource(name, info.shape, info.format, lambda name=name: [file.data(name)])
            for name, info in file.tensors.items()
            if name not in drop and name not in (tensors or {})
        ]
        sources += [array_tensor(name, data) for name, data in (tensors or {}).items()]
        return write_gguf(path.with_name("rewritten.gguf"), pairs | (metadata or {}), sources)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "m.gguf", layers=3, types="F16")


def test_llama(tmp_path):
    config = config_of(write_model(tmp_path / "m.gguf", layers=3, width=64, heads=8, kv_heads=2, ffn=96, vocab=311,
                                   exit_layers=[1, 2], rope={"theta": 500000.0}, context_length=4096))  # fmt: skip
    assert config == ModelConfig(
        architecture="llama", name="random llama", layers=3, width=64, heads=8, kv_heads=2, head_size=8, ffn=96,
        vocab_size=311, context_length=4096, rms_eps=pytest.approx(1e-5),
        rope=RopeConfig(500000.0, 8, "norm", original_context=4096), qkv_bias=False, qk_norm=False, tied_head=True,
        exit_layers=(1, 2),
    )  # fmt: skip
    assert (config.group, config.q_width, config.kv_width) == (4, 64, 16)


def test_qwen(tmp_path):
    path = write_model(tmp_path / "2.gguf", architecture="qwen2", heads=7, kv_heads=1, width=112, tied=False)
    config = config_of(path)
    assert config.qkv_bias and not config.qk_norm and not config.tied_head and config.group == 7
    assert config.rope.style == "neox"
    config = config_of(write_model(tmp_path / "3.gguf", architecture="qwen3", head_size=32))
    assert config.qk_norm and not config.qkv_bias and config.head_size == 32 and config.q_width == 128


def test_rope_scalings(tmp_path):
    linear = config_of(write_model(tmp_path / "l.gguf", rope={"linear": 4.0})).rope
    assert (linear.scaling, linear.factor) == ("linear", 4.0)
    yarn = {"yarn": {"factor": 4.0, "original_context": 512}}
    yarn = config_of(write_model(tmp_path / "y.gguf", rope=yarn, metadata={"llama.rope.scaling.attn_factor": 1.5})).rope
    assert (yarn.scaling, yarn.factor, yarn.original_context, yarn.attn_factor) == ("yarn", 4.0, 512, 1.5)
    yarn = config_of(write_model(tmp_path / "d.gguf", rope={"yarn": {"factor": 2.0}}, context_length=777)).rope
    assert yarn.original_context == 777, "the context itself where the file names no original"
    path = write_model(tmp_path / "3.gguf", rope=LLAMA3_ROPE)
    with GGUFFile(path) as file:
        config = config_from_gguf(file)
        factors = rope_factors(file, config)
        assert config.rope.scaling == "llama3" and factors.dtype == np.float32
        np.testing.assert_allclose(factors, llama3_factors(16, 500000.0, **LLAMA3_ROPE["llama3"]))
    none = config_of(write_model(tmp_path / "n.gguf", metadata={"llama.rope.scaling.type": "none",
                                                                "llama.rope.scaling.factor": 8.0})).rope  # fmt: skip
    assert (none.scaling, none.factor) == ("none", 1.0)


REFUSED = {
    "llama.block_count": [0, 2**32 - 1, -1, "2", 2.0, True],
    "llama.embedding_length": [0, 63, 2**31],
    "llama.attention.head_count": [0, 3, 2**30],
    "llama.attention.head_count_kv": [0, 3, 8],
    "llama.attention.key_length": [0, 15, 100_000],
    "llama.context_length": [0, 2**31],
    "llama.feed_forward_length": [0, 127, 2**31],
    "llama.attention.layer_norm_rms_epsilon": [0.0, -1e-5, math.nan, math.inf, 2.0, "small"],
    "llama.rope.freq_base": [0.0, -1.0, 1.0, math.nan, math.inf],
    "llama.rope.scaling.factor": [-1.0, math.nan, math.inf, 1e-9],
    "llama.rope.scaling.attn_factor": [0.0, math.nan],
    "llama.rope.scaling.type": [3],
    "edge.early_exit.layers": [[0], [3], [2, 1], [1, 1], ["1"], 1],
    "tokenizer.ggml.tokens": [["a", "b"]],
    "general.architecture": [7],
    "split.count": [[2, 3], [2], "3", True, 3.0, -1],
    "llama.attention.causal": [[True, False], "no", 0],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in REFUSED.items() for value in values])
def test_value_that_no_model_has(model, key, value):
    path = rewritten(model, {key: value})
    with GGUFFile(path) as file, pytest.raises(CorruptModelError) as caught:
        config_from_gguf(file)
    # A size that fits no tensor is noticed at the tensor; all else at the key.
    named = caught.value.reason.startswith(f"{key} ")
    assert named or "tensor" in caught.value.reason or "kv heads evenly" in caught.value.reason
    if named:
        with GGUFFile(path) as file:
            assert caught.value.offset == file.metadata.offset(key)


UNSUPPORTED = {
    "a mixture of experts": {"llama.expert_count": 8},
    "sliding window of 128": {"llama.attention.sliding_window": 128},
    "longrope": {"llama.rope.scaling.type": "longrope"},
    "split into 3": {"split.count": 3},
    "of type 'adapter'": {"general.type": "adapter"},
    "value head size of 32": {"llama.attention.value_length": 32},
    "RoPE over 8 of": {"llama.rope.dimension_count": 8},
    "differs between layers": {"llama.attention.head_count_kv": [2, 2, 1]},
    "logit_scale": {"llama.logit_scale": 0.5},
    "not causal": {"llama.attention.causal": False},
    "architecture 'mamba'": {"general.architecture": "mamba"},
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_feature_that_is_not_computed(model, what):
    with pytest.raises(UnsupportedModelError, match=what) as caught:
        config_of(rewritten(model, UNSUPPORTED[what]))
    assert "llama.cpp" in str(caught.value) or "general.type" in UNSUPPORTED[what]
    if "mamba" in what:
        assert caught.value.supported == ("llama", "qwen2", "qwen3")


def test_a_later_part_of_a_split_model_says_so(tmp_path):
    path = write_gguf(tmp_path / "m-00002-of-00003.gguf", {"split.no": 1, "split.count": 3},
                      [array_tensor("a", np.zeros((4, 32), np.float32))])
    with pytest.raises(UnsupportedModelError, match=r"split into 3 files.*--merge"):
        config_of(path)


@pytest.mark.parametrize("name, shown", [("\x1b[2J\nReal name\r\x07", "[2J Real name"), ("n" * 70_000, "n" * 200),
                                         ("\x00\n", "rewritten"), (["a", "b"], "rewritten"), (7, "rewritten")])
def test_names_are_fit_for_a_terminal(model, name, shown):
    assert config_of(rewritten(model, {"general.name": name})).name == shown


def test_offer_depends_on_the_extra(model, monkeypatch):
    path = rewritten(model, {"general.architecture": "mamba"})
    monkeypatch.setattr("edge_runtime.models.unsupported.find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"edge-runtime\[llamacpp\]"):
        config_of(path)
    monkeypatch.setattr("edge_runtime.models.unsupported.find_spec", lambda name: object())
    with pytest.raises(UnsupportedModelError, match=r'device="llama\.cpp" runs the whole file'):
        config_of(path)


@pytest.mark.parametrize("key", ["general.architecture", "llama.block_count", "llama.embedding_length",
                                 "llama.attention.head_count", "llama.feed_forward_length", "llama.context_length",
                                 "llama.attention.layer_norm_rms_epsilon"])  # fmt: skip
def test_missing_key_is_named(model, key):
    with pytest.raises(CorruptModelError, match=f"'{key}' is missing"):
        config_of(rewritten(model, drop=(key,)))


def test_defaults(model):
    path = rewritten(model, drop=("llama.attention.key_length", "llama.attention.value_length", "general.name",
                                  "llama.rope.dimension_count", "llama.rope.freq_base"))  # fmt: skip
    config = config_of(path)
    assert (config.head_size, config.rope.dimension_count, config.rope.theta) == (16, 16, 10000.0)
    assert config.name == "rewritten"
    with pytest.raises(CorruptModelError, match="attn_k"):  # as many kv heads as heads, which the tensors contradict
        config_of(rewritten(model, drop=("llama.attention.head_count_kv",)))
    assert config_of(rewritten(model, {"llama.attention.head_count_kv": [2, 2, 2]})).kv_heads == 2
    assert config_of(rewritten(model, {"llama.attention.sliding_window": 2048})).context_length == 2048


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.attn_norm.weight",
                                  "blk.2.attn_q.weight", "blk.0.ffn_down.weight"])  # fmt: skip
def test_missing_tensor_is_named(model, name):
    with pytest.raises(CorruptModelError, match=name):
        config_of(rewritten(model, drop=(name,)))


@pytest.mark.parametrize("name, shape", [("blk.1.attn_q.weight", (64, 32)), ("blk.1.ffn_up.weight", (64, 128)),
                                         ("output_norm.weight", (63,)), ("token_embd.weight", (300, 32)),
                                         ("token_embd.weight", (299, 64)), ("token_embd.weight", (300 * 64,)),
                                         ("output.weight", (299, 64)), ("rope_freqs.weight", (16,))])  # fmt: skip
def test_misshaped_tensor_is_named(model, name, shape):
    with pytest.raises(CorruptModelError, match=f"{name}|tokens") as caught:
        config_of(rewritten(model, tensors={name: np.ones(shape, np.float32)}))
    assert caught.value.offset > 0


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.1.attn_output.bias", "blk.0.attn_q_norm.weight",
                                  "output.bias"])  # fmt: skip
def test_tensor_that_would_be_left_out(model, name):
    with pytest.raises(UnsupportedModelError, match=name):
        config_of(rewritten(model, tensors={name: np.ones(64, np.float32)}))


def test_vocab_size_counts_without_a_token_list(model, tmp_path):
    assert config_of(rewritten(model, {"llama.vocab_size": 299})).vocab_size == 300
    bare = write_model(tmp_path / "bare.gguf", tokenizer=None)
    assert config_of(rewritten(bare)).vocab_size == 300
    for value in (299, 0):
        with pytest.raises(CorruptModelError, match="vocab_size"):
            config_of(rewritten(bare, {"llama.vocab_size": value}))


def test_missing_biases_and_norms(tmp_path):
    path = write_model(tmp_path / "q2.gguf", architecture="qwen2")
    with pytest.raises(CorruptModelError, match=r"blk\.1\.attn_k\.bias"):
        config_of(rewritten(path, drop=("blk.1.attn_k.bias",)))
    path = write_model(tmp_path / "q3.gguf", architecture="qwen3")
    with pytest.raises(CorruptModelError, match=r"blk\.0\.attn_q_norm\.weight"):
        config_of(rewritten(path, drop=("blk.0.attn_q_norm.weight",)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_rope_factors_that_divide_by_nothing(model, value):
    factors = np.ones(8, np.float32)
    factors[3] = value
    with pytest.raises(CorruptModelError, match="rope_freqs"):
        config_of(rewritten(model, tensors={"rope_freqs.weight": factors}))


def test_quantized_norm_is_refused(model, tmp_path):
    with GGUFFile(model) as file:
        pairs = {key: RawValue(file.metadata.raw(key)) for key in file.metadata}
        sources = [TensorSource(n, i.shape, i.format, lambda n=n: [file.data(n)]) for n, i in file.tensors.items()
                   if n != "output_norm.weight"]  # fmt: skip
        sources.append(array_tensor("output_norm.weight", np.zeros(36, np.uint8), "Q4_0", (64,)))
        path = write_gguf(tmp_path / "norm.gguf", pairs, sources)
    with pytest.raises(UnsupportedModelError, match="output_norm"):
        config_of(path)
