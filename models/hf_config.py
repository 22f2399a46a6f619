"""`config.json` of a Hugging Face folder as a GGUF file's metadata, for the architectures that are computed here."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import CorruptModelError
from edge_runtime.models.safetensors_file import read_json
from edge_runtime.models.unsupported import unsupported

# model_type -> GGUF architecture. Mistral's decoder is Llama's where its window covers the context.
MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
QWEN3_HEAD_SIZE = 128  # where the config does not say
_FALSE_BY_DEFAULT = ("mlp_bias", "attention_out_bias")


@dataclass(frozen=True)
class HFConfig:
    """metadata: keys of the architecture, without the tokenizer's. factors: divisors of the RoPE frequencies, float32
    [head_size / 2], or None. tied_head: None where the file does not say, then the weights do. eos_ids: that the folder
    names, the first is the tokenizer's usual one."""

    architecture: str
    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool | None
    metadata: dict[str, Any]
    factors: np.ndarray | None
    bos_id: int | None
    eos_ids: tuple[int, ...]


def read_hf_config(folder: Path) -> HFConfig:
    """CorruptModelError: a value is missing or has the wrong type. UnsupportedModelError: an architecture or feature
    that is not computed here."""
    path = folder / "config.json"
    keys = _Keys(path, read_json(path))
    kind = keys.values.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise unsupported(f"model_type {kind!r:.40} in {path}", tuple(MODEL_TYPES))
    architecture = MODEL_TYPES[kind]
    context = keys.integer("max_position_embeddings")
    _refuse(keys, kind, context)
    width, heads, layers = (keys.integer(name) for name in
                            ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = keys.integer("num_key_value_heads", heads)
    head_size = keys.integer("head_dim", QWEN3_HEAD_SIZE if kind == "qwen3" else max(1, width // heads))
    if heads % kv_heads:
        keys.corrupt("num_key_value_heads", f"is {kv_heads}: {heads} heads cannot share them evenly")
    if head_size % 2:
        keys.corrupt("head_dim", f"is {head_size}: RoPE needs an even head size")
    vocab_size = keys.integer("vocab_size")
    sizes: dict[str, Any] = {
        "context_length": context, "embedding_length": width, "block_count": layers,
        "feed_forward_length": keys.integer("intermediate_size"), "attention.head_count": heads,
        "attention.head_count_kv": kv_heads, "attention.key_length": head_size, "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": keys.number("rms_norm_eps", 1e-6), "rope.dimension_count": head_size,
        "vocab_size": vocab_size,
    }  # fmt: skip
    rope, factors = _rope(keys, context, head_size)
    generation = folder / "generation_config.json"
    ends = _ids(read_json(generation).get("eos_token_id")) if generation.is_file() else ()
    named = _ids(keys.values.get("eos_token_id"))
    bos = _ids(keys.values.get("bos_token_id"))
    return HFConfig(
        architecture=architecture, name=_name(keys, folder), layers=layers, heads=heads, kv_heads=kv_heads,
        head_size=head_size, vocab_size=vocab_size,
        qkv_bias=kind == "qwen2" or keys.flag("attention_bias", False), qk_norm=kind == "qwen3",
        tied_head=keys.flag("tie_word_embeddings", False) if "tie_word_embeddings" in keys.values else None,
        metadata={f"{architecture}.{key}": value for key, value in (sizes | rope).items()}, factors=factors,
        bos_id=bos[0] if bos else None, eos_ids=tuple(dict.fromkeys((*named, *ends))))


def _name(keys: _Keys, folder: Path) -> str:
    """The repository's, where the folder was pulled from one."""
    name = keys.values.get("_name_or_path")
    return Path(name).name if isinstance(name, str) and Path(name).name else folder.resolve().name


def _refuse(keys: _Keys, kind: str, context: int) -> None:
    if keys.values.get("quantization_config"):
        method = keys.values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise unsupported(f"a model quantized with {method!r:.40}", ("float safetensors",))
    activation = keys.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise unsupported(f"hidden_act {activation!r:.40}", ("silu",))
    for name in _FALSE_BY_DEFAULT:
        if keys.flag(name, False):
            raise unsupported(f"{name} of a {kind} model")
    if kind == "qwen3" and keys.flag("attention_bias", False):
        raise unsupported("attention_bias of a qwen3 model")
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported(f"RoPE over {keys.values['partial_rotary_factor']} of a head", ("RoPE over whole heads",))
    window = keys.values.get("sliding_window")
    used = keys.flag("use_sliding_window", kind == "mistral")
    if used and isinstance(window, int) and not isinstance(window, bool) and 0 < window < context:
        raise unsupported(f"a sliding window of {window} tokens", ("full attention",))
    kinds = keys.values.get("layer_types")
    if isinstance(kinds, list) and used and any(k != "full_attention" for k in kinds):
        raise unsupported("layers of sliding attention", ("full attention",))


def _rope(keys: _Keys, context: int, head_size: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Metadata keys, and the divisors that llama3's scaling becomes."""
    told = keys.values.get("rope_parameters") or keys.values.get("rope_scaling") or {}
    if not isinstance(told, Mapping):
        keys.corrupt("rope_parameters", "is not an object")
    rope = _Keys(keys.path, told, "rope_parameters.")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    kind = told.get("rope_type", told.get("type", "default"))
    pairs: dict[str, Any] = {"rope.freq_base": theta}
    if kind == "default":
        return pairs, None
    factor = rope.number("factor", 1.0)
    if not 0 < factor < 1e6 or theta <= 1:
        rope.corrupt("factor", f"is {factor:g} and rope_theta {theta:g}, which no model has")
    original = rope.integer("original_max_position_embeddings",
                            keys.integer("original_max_position_embeddings", context))
    if kind == "linear":
        return pairs | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, None
    if kind == "llama3":
        return pairs, _llama3_factors(theta, head_size, factor, rope.number("low_freq_factor", 1.0),
                                      rope.number("high_freq_factor", 4.0), original)
    if kind == "yarn":
        if not rope.flag("truncate", True):
            raise unsupported("YaRN without truncation")
        return pairs | {"rope.scaling.type": "yarn", "rope.scaling.factor": factor,
                        "rope.scaling.original_context_length": original,
                        "rope.scaling.yarn_beta_fast": rope.number("beta_fast", 32.0),
                        "rope.scaling.yarn_beta_slow": rope.number("beta_slow", 1.0),
                        "rope.scaling.attn_factor": _yarn_magnitude(rope, factor)}, None
    raise unsupported(f"RoPE scaling {kind!r:.40}", ("default", "linear", "llama3", "yarn"))


def _yarn_magnitude(rope: _Keys, factor: float) -> float:
    """The factor on cosine and sine beside 1 + ln(factor) / 10, which GGUF's readers put there themselves."""
    usual = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    scale, everywhere = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    wanted = rope.number("attention_factor", 0.0)
    if not wanted and scale and everywhere and factor > 1:
        wanted = (0.1 * scale * math.log(factor) + 1) / (0.1 * everywhere * math.log(factor) + 1)
    return (wanted or usual) / usual


def _llama3_factors(theta: float, head_size: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Llama 3.1's: slow frequencies are divided by `factor`, fast ones kept, a ramp between (transformers'
    modeling_rope_utils)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    smooth = np.clip((original / wavelengths - low) / max(high - low, 1e-9), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and v >= 0)


class _Keys:
    """Values of a JSON object, each with its check."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def corrupt(self, key: str, reason: str) -> Any:
        raise CorruptModelError(self.path, 0, f"{self.prefix}{key} {reason}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            return default if default is not None else self.corrupt(key, "is missing")
        if type(value) is not int or not 1 <= value < 1 << 31:
            self.corrupt(key, f"is {value!r:.40}, not a whole number from 1 up")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.corrupt(key, f"is {value!r:.40}, not a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.corrupt(key, f"is {value!r:.40}, not true or false")
        return bool(value)
