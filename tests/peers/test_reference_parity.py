"""The NumPy forward pass against transformers and llama.cpp: every architecture, RoPE style and scaling."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.gguf_factory import LLAMA3_ROPE, write_model

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

YARN_ROPE = {"theta": 10000.0, "yarn": {"factor": 4.0, "original_context": 64}}
LINEAR_ROPE = {"theta": 10000.0, "linear": 4.0}
SIZES = {"layers": 3, "width": 96, "heads": 6, "kv_heads": 2, "ffn": 160, "vocab": 310}
ODD = {"layers": 2, "width": 112, "heads": 7, "kv_heads": 1, "ffn": 200, "vocab": 300}  # 7 query heads per kv head

CASES = {
    "llama": {"architecture": "llama", **SIZES},
    "llama untied": {"architecture": "llama", "tied": False, **SIZES},
    "llama wide heads": {"architecture": "llama", "head_size": 32, **SIZES},
    "llama linear": {"architecture": "llama", "rope": LINEAR_ROPE, **SIZES},
    "llama 3 factors": {"architecture": "llama", "rope": LLAMA3_ROPE, "head_size": 64, **SIZES},
    "llama yarn": {"architecture": "llama", "rope": YARN_ROPE, "head_size": 64, **SIZES},
    "llama biases": {"architecture": "llama", "qkv_bias": True, **SIZES},
    "qwen2": {"architecture": "qwen2", **ODD},
    # llama.cpp wants heads * head_size == width of qwen2
    "qwen2 untied yarn": {**SIZES, "architecture": "qwen2", "tied": False, "rope": YARN_ROPE, "width": 384},
    "qwen3": {"architecture": "qwen3", "head_size": 32, **SIZES},
    "qwen3 yarn": {"architecture": "qwen3", "head_size": 64, "rope": YARN_ROPE, **ODD},
    "qwen3 linear": {"architecture": "qwen3", "rope": LINEAR_ROPE, **ODD},
}


def rope_parameters(rope: dict | None) -> dict:
    rope = rope or {}
    parameters: dict = {"rope_type": "default", "rope_theta": rope.get("theta", 10000.0)}
    if "linear" in rope:
        parameters |= {"rope_type": "linear", "factor": rope["linear"]}
    if "yarn" in rope:
        yarn = rope["yarn"]
        parameters |= {"rope_type": "yarn", "factor": yarn["factor"],
                       "original_max_position_embeddings": yarn["original_context"]}  # fmt: skip
    if "llama3" in rope:
        told = rope["llama3"]
        parameters |= {"rope_type": "llama3", "factor": told["factor"], "low_freq_factor": told["low"],
                       "high_freq_factor": told["high"],
                       "original_max_position_embeddings": told["original_context"]}  # fmt: skip
    return parameters


def hugging_face(case: dict):
    """A model of transformers with random weights, in float32."""
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[case["architecture"]]
    parameters = rope_parameters(case.get("rope"))
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope = {"rope_parameters": parameters}
    else:
        scaling = None if parameters["rope_type"] == "default" else parameters
        rope = {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}
    bias = {"attention_bias": case.get("qkv_bias", False)} if kind == "Llama" else {}
    config = getattr(transformers, kind + "Config")(
        vocab_size=case["vocab"], hidden_size=case["width"], intermediate_size=case["ffn"],
        num_hidden_layers=case["layers"], num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"],
        head_dim=case.get("head_size") or case["width"] // case["heads"], rms_norm_eps=1e-5,
        max_position_embeddings=2048, tie_word_embeddings=case.get("tied", True), attn_implementation="eager",
        **rope, **bias,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()  # llama.cpp's llama files may have it, ours refuse it
            elif parameter.ndim == 1:
                parameter.copy_(("norm" in name) + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from RoPE halves to RoPE pairs, as GGUF's llama architecture holds them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_weights(model, case: dict) -> dict[str, np.ndarray]:
    """The weights of a transformers model under GGUF's names and in GGUF's layout."""
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    weights = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy().copy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            if module == "self_attn.o_proj" and kind == "bias":
                continue
            if case["architecture"] == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                data = in_pairs(data, case["heads"] if module.endswith("q_proj") else case["kv_heads"])
            weights[f"blk.{layer}.{names[module]}.{kind}"] = data
        else:
            tops = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm",
                    "lm_head.weight": "output"}  # fmt: skip
            weights[tops[name] + ".weight"] = data
    return weights


def write_case(path: Path, case: dict, weights: dict[str, np.ndarray] | None = None, types: str = "F32") -> Path:
    return write_model(path, **case, types=types, weights=weights)


@pytest.mark.parametrize("name", CASES)
def test_transformers(tmp_path, name):
    case = CASES[name]
    model = hugging_face(case)
    path = write_case(tmp_path / "m.gguf", case, gguf_weights(model, case))
    ids = np.random.default_rng(0).integers(0, case["vocab"], 150)
    with torch.no_grad():
        out = model(torch.tensor(ids)[None], output_hidden_states=True)
    with GGUFFile(path) as file:
        trace = ReferenceModel.load(file).trace(ids)
    theirs = out.logits[0].numpy()
    np.testing.assert_allclose(trace.logits, theirs, atol=2e-4 * np.abs(theirs).max())
    hidden = torch.stack(out.hidden_states)[:-1, 0].numpy()  # the last one is normed
    np.testing.assert_allclose(trace.hidden[:-1], hidden, atol=2e-4 * np.abs(hidden).max())
    np.testing.assert_allclose(trace.normed, out.hidden_states[-1][0].numpy(), atol=1e-3)


@pytest.mark.parametrize("types, tolerance", [("F32", 3e-5), ("F16", 2e-2)])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp(tmp_path, name, types, tolerance):
    """With F16 weights llama.cpp rounds activations to f16, hence the second tolerance."""
    pytest.importorskip("llama_cpp")
    from tests.peers.llama_cpp_model import llama_cpp_logits

    case = CASES[name]
    path = write_case(tmp_path / "m.gguf", case, types=types)
    ids = np.random.default_rng(1).integers(0, case["vocab"], 150)
    theirs = llama_cpp_logits(path, ids)
    with GGUFFile(path) as file:
        ours = ReferenceModel.load(file).forward(ids)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("types", ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_llama_cpp_reads_our_blocks(tmp_path, types):
    """llama.cpp rounds activations to 8 bits, so logits agree only roughly: a wrong layout would not agree at all."""
    pytest.importorskip("llama_cpp")
    from tests.peers.llama_cpp_model import llama_cpp_logits

    path = write_model(tmp_path / "m.gguf", types=types, width=256, ffn=512, tied=False)
    ids = np.random.default_rng(2).integers(0, 300, 60)
    theirs = llama_cpp_logits(path, ids)
    with GGUFFile(path) as file:
        ours = ReferenceModel.load(file).forward(ids)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
    assert np.abs(ours - theirs).mean() < 0.03 * np.abs(theirs).mean()
