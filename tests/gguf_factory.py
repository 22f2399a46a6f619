"""Random-weight GGUF files for tests: real structure, deterministic from a seed, no download and no llama.cpp.

    write_model(tmp_path / "m.gguf", architecture="qwen3", types="Q4_K", width=256)
"""
from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edge_runtime.models.names import layer_names
from edge_runtime.quant.formats import block_format
from edge_runtime.quant.quantize import quantize

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BPE_SPECIALS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_ROPE = {"theta": 500000.0, "llama3": {"factor": 8.0, "low": 1.0, "high": 4.0, "original_context": 64}}
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # gguf token types


def write_model(
    path: str | Path,
    *,
    architecture: str = "llama",
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int | None = None,
    ffn: int = 128,
    vocab: int = 300,
    types: str | Mapping[str, str] = "Q4_0",
    rope: Mapping[str, Any] | None = None,
    tied: bool = True,
    qkv_bias: bool | None = None,
    context_length: int = 2048,
    seed: int = 0,
    tokenizer: str | None = "bpe",
    chat_template: str | None = CHAT_TEMPLATE,
    exit_layers: Sequence[int] | None = None,
    metadata: Mapping[str, int | float | str | bool] | None = None,
    scale: float = 1.0,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a model and returns its path.

    types: one tensor type for all matrices, or a mapping from roles (token_embd, output, q, k, v, o, gate, up, down,
    or `default`) to types; a role whose row length the type's block does not divide falls back to F16.
    rope: theta, and one of `{"linear": factor}`, `{"yarn": {"factor": ..., "original_context": ...}}`,
    `{"llama3": {"factor": ..., "low": ..., "high": ..., "original_context": ...}}`, or `{"factors": array}`.
    qkv_bias: qwen2 has them unless told otherwise. tokenizer: "bpe" (260 tokens at least), "spm" (259) or None.
    metadata: further keys, with the architecture's prefix already in them, which replace those written by default.
    scale: of the matrices' weights, times inputs ** -0.5. weights: float32 by tensor name, instead of random ones.
    """
    head_size = head_size or width // heads
    weights = weights or random_weights(
        architecture=architecture, layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_size=head_size,
        ffn=ffn, vocab=vocab, tied=tied, qkv_bias=qkv_bias, seed=seed, scale=scale,
    )  # fmt: skip
    pairs: dict[str, Any] = {
        f"{architecture}.{key}": value
        for key, value in {
            "context_length": context_length,
            "embedding_length": width,
            "block_count": layers,
            "feed_forward_length": ffn,
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.key_length": head_size,
            "attention.value_length": head_size,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": head_size,
        }.items()
    }
    rope_pairs, factors = _rope(architecture, head_size, rope or {})
    pairs |= rope_pairs
    if tokenizer:
        pairs |= {"tokenizer.chat_template": chat_template} if chat_template else {}
    pairs |= metadata or {}
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(f"random {architecture}")
    for key, value in pairs.items():
        _add(writer, key, value)
    if exit_layers is not None:
        writer.add_array("edge.early_exit.layers", [int(layer) for layer in exit_layers])
    if tokenizer == "bpe":
        _add_bpe(writer, vocab)
    elif tokenizer == "spm":
        _add_spm(writer, vocab)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, weight in weights.items():
        _add_tensor(writer, name, weight, _type_of(name, types))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def random_weights(*, architecture: str, layers: int, width: int, heads: int, kv_heads: int, head_size: int, ffn: int,
                   vocab: int, tied: bool = True, qkv_bias: bool | None = None, seed: int = 0,
                   scale: float = 1.0) -> dict[str, np.ndarray]:  # fmt: skip
    """The float32 tensors of a model by name, in the layout of GGUF (llama's q and k rows in RoPE pairs)."""
    rng = np.random.default_rng(seed)
    bias = architecture == "qwen2" if qkv_bias is None else qkv_bias

    def matrix(rows: int, inputs: int) -> np.ndarray:
        return rng.standard_normal((rows, inputs), np.float32) * np.float32(scale * inputs**-0.5)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    # Small embeddings: the layers, not the last token, decide a tied head's logits.
    embedding = 0.15 * rng.standard_normal((vocab, width), np.float32)
    weights = {"token_embd.weight": embedding, "output_norm.weight": norm(width)}
    if not tied:
        weights["output.weight"] = matrix(vocab, width)
    for layer in range(layers):
        names = layer_names(layer)
        weights |= {
            names.attn_norm: norm(width),
            names.q: matrix(heads * head_size, width),
            names.k: matrix(kv_heads * head_size, width),
            names.v: matrix(kv_heads * head_size, width),
            names.o: matrix(width, heads * head_size),
            names.ffn_norm: norm(width),
            names.gate: matrix(ffn, width),
            names.up: matrix(ffn, width),
            names.down: matrix(width, ffn),
        }
        if bias:
            for name, rows in ((names.q_bias, heads), (names.k_bias, kv_heads), (names.v_bias, kv_heads)):
                weights[name] = 0.1 * rng.standard_normal(rows * head_size).astype(np.float32)
        if architecture == "qwen3":
            weights |= {names.q_norm: norm(head_size), names.k_norm: norm(head_size)}
    return weights


def llama3_factors(head_size: int, theta: float, factor: float, low: float, high: float,
                   original_context: int) -> np.ndarray:  # fmt: skip
    """The divisors of Llama 3.1's RoPE, as exporters write them, float32 [head_size / 2]."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    smooth = np.clip((original_context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _rope(architecture: str, head_size: int, rope: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    theta = float(rope.get("theta", 10000.0))
    pairs: dict[str, Any] = {f"{architecture}.rope.freq_base": theta}
    factors = rope.get("factors")
    if "llama3" in rope:
        factors = llama3_factors(head_size, theta, **rope["llama3"])
    kind = "yarn" if "yarn" in rope else "linear" if "linear" in rope else None
    if kind:
        told = rope[kind] if isinstance(rope[kind], Mapping) else {"factor": rope[kind]}
        pairs[f"{architecture}.rope.scaling.type"] = kind
        pairs[f"{architecture}.rope.scaling.factor"] = float(told["factor"])
        if "original_context" in told:
            pairs[f"{architecture}.rope.scaling.original_context_length"] = int(told["original_context"])
    return pairs, None if factors is None else np.asarray(factors, np.float32)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _type_of(name: str, types: str | Mapping[str, str]) -> str:
    if isinstance(types, str):
        return types
    role = name.removesuffix(".weight").split(".")[-1]
    role = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}.get(role, role.removeprefix("ffn_"))
    return types.get(role, types.get("default", "F16"))


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, type: str) -> None:
    format = block_format("F32" if weight.ndim == 1 else type)
    if weight.shape[-1] % format.block_size:
        format = block_format("F16")
    if format.name == "F32":
        writer.add_tensor(name, weight)
    else:
        raw = quantize(weight, format)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(format.ggml_type))


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def bpe_vocabulary(size: int) -> tuple[list[str], list[str], list[int]]:
    """(tokens, merges, types): 256 bytes, merged pairs of letters and common beginnings, four special tokens last."""
    tokens, merges = byte_characters(), []
    wanted = size - len(tokens) - len(BPE_SPECIALS)
    if wanted < 0:
        raise ValueError(f"a BPE vocabulary of {size}: {len(tokens) + len(BPE_SPECIALS)} at least")
    common = ["Ġ t", "h e", "i n", "Ġ a", "Ġt he", "e r", "o n", "r e", "Ġ s", "a n", "Ġ w", "in g", "Ġa n", "Ġan d"]
    pairs = [f"{a} {b}" for a in "Ġ" + string.ascii_lowercase for b in string.ascii_lowercase]
    for merge in [*common, *(pair for pair in pairs if pair not in common)]:
        merged = merge.replace(" ", "")
        if len(merges) < wanted and merged not in tokens:
            merges.append(merge)
            tokens.append(merged)
    fillers = [f"<|unused{i}|>" for i in range(wanted - len(merges))]
    kinds = [NORMAL] * len(tokens) + [UNUSED] * len(fillers) + [CONTROL] * len(BPE_SPECIALS)
    return tokens + fillers + BPE_SPECIALS, merges, kinds


def _add_bpe(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokens, merges, kinds = bpe_vocabulary(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)


def spm_vocabulary(size: int) -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types): unknown, BOS, EOS, 256 bytes, letters and pieces with falling scores."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    if size < len(tokens):
        raise ValueError(f"an SPM vocabulary of {size}: {len(tokens)} at least")
    pieces = ["▁", *string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *".,!?'-"]
    pieces = ["▁t", "he", "in", "▁a", "▁the", "er", "on", "re", "▁s", "an", "ing", "▁and", *pieces]
    pieces += [a + b for a in "▁" + string.ascii_lowercase for b in string.ascii_lowercase if a + b not in pieces]
    pieces = pieces[: size - len(tokens)]
    fillers = [f"<unused{i}>" for i in range(size - len(tokens) - len(pieces))]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces) + len(fillers))]
    return tokens + pieces + fillers, scores, kinds + [NORMAL] * len(pieces) + [UNUSED] * len(fillers)


def _add_spm(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokens, scores, kinds = spm_vocabulary(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
