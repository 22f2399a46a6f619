"""Small Hugging Face folders written without transformers: config, tokenizer, weights."""
from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.gguf_factory import byte_characters

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def byte_level(pattern: str | None) -> dict[str, Any]:
    """A pre_tokenizer of tokenizer.json; None: GPT-2's own pattern."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    if pattern is None:
        return last
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, last]}


def bpe_json(pre_tokenizer: Mapping[str, Any], *, specials: Sequence[str] = ("<|end|>", "<|im_end|>"),
             added: Sequence[str] = ("<tool>",), merges_as_pairs: bool = True, **changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json of 256 bytes, some merges and added tokens."""
    tokens = byte_characters()
    pairs = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġt", "he"), ("1", "2"), ("12", "3"), ("'", "s"), ("Ġ", "Ġ")]
    pairs += [(a, b) for a in string.ascii_lowercase[:8] for b in "aeiou" if (a, b) != ("h", "e")]
    tokens += ["".join(pair) for pair in pairs]
    vocab = {token: number for number, token in enumerate(tokens)}
    entries = [{"id": len(tokens) + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": text in specials} for i, text in enumerate((*specials, *added))]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": [list(p) if merges_as_pairs else " ".join(p) for p in pairs]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": None,
            "pre_tokenizer": dict(pre_tokenizer), "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": model, **changes}


def spm_json() -> dict[str, Any]:
    """A SentencePiece vocabulary as fast tokenizers write it: byte fallback, spaces as U+2581, BOS by a template."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters,
              *string.digits, *".,!?'-"]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("in", "g"), ("e", "r"), ("▁", "a")]
    tokens += ["".join(pair) for pair in pairs]
    vocab = {token: number for number, token in enumerate(tokens)}
    entries = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, text in enumerate(tokens[:3])]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    normalizer = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": normalizer,
            "pre_tokenizer": None, "post_processor": template, "decoder": None,
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": vocab, "merges": [list(p) for p in pairs]}}


def hf_config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "vocab_size": 320, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
            "bos_token_id": None, "eos_token_id": 304} | changes


def hf_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    width, ffn, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    matrix = lambda rows, inputs: (rng.standard_normal((rows, inputs)) * inputs**-0.5).astype(np.float32)
    norm = lambda size: (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)
    weights = {"model.embed_tokens.weight": matrix(vocab, width), "model.norm.weight": norm(width)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocab, width)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        weights |= {p + "input_layernorm.weight": norm(width), p + "post_attention_layernorm.weight": norm(width),
                    p + "self_attn.q_proj.weight": matrix(q, width), p + "self_attn.k_proj.weight": matrix(kv, width),
                    p + "self_attn.v_proj.weight": matrix(kv, width), p + "self_attn.o_proj.weight": matrix(width, q),
                    p + "mlp.gate_proj.weight": matrix(ffn, width), p + "mlp.up_proj.weight": matrix(ffn, width),
                    p + "mlp.down_proj.weight": matrix(width, ffn)}  # fmt: skip
        if config["model_type"] == "qwen2":
            weights |= {f"{p}self_attn.{name}_proj.bias": norm(size) for name, size in (("q", q), ("k", kv), ("v", kv))}
        if config["model_type"] == "qwen3":
            weights |= {f"{p}self_attn.{name}_norm.weight": norm(head) for name in "qk"}
    return weights


def words_of(weight: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array as the words of a float type; bfloat16 cuts the lower half off."""
    if dtype == "BF16":
        return (weight.view(np.uint32) >> 16).astype("<u2")
    return weight.astype(DTYPES[dtype])


def safetensors_bytes(weights: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    header, body, at = {}, b"", 0
    for name, weight in weights.items():
        raw = words_of(weight, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [at, at + len(raw)]}
        body += raw
        at += len(raw)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def write_hf_folder(folder: Path, *, config: Mapping[str, Any] | None = None,
                    tokenizer: Mapping[str, Any] | None = None, tokenizer_config: Mapping[str, Any] | None = None,
                    weights: Mapping[str, np.ndarray] | None = None, dtype: str = "F32", shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config() if config is None else config
    weights = hf_weights(config) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(bpe_json(byte_level(QWEN2)) if tokenizer is None else tokenizer))
    if tokenizer_config is None:
        tokenizer_config = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(weights, dtype))
        return folder
    names, places = list(weights), {}
    for i in range(shards):
        part = names[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: weights[name] for name in part}, dtype))
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
