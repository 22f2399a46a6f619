"""What a model is, read from its file and checked: sizes, RoPE, and which tensors it must hold."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_runtime.errors import CorruptModelError, UnsupportedModelError
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, ROPE_FACTORS, layer_names
from edge_runtime.models.rope import RopeConfig, rope_inverse_frequencies
from edge_runtime.models.unsupported import unsupported

__all__ = ["ARCHITECTURES", "ModelConfig", "RopeConfig", "check_tensors", "config_from_gguf", "rope_factors",
           "rope_inverse_frequencies"]  # fmt: skip

ARCHITECTURES = {"llama": "norm", "qwen2": "neox", "qwen3": "neox"}  # and how they pair values in RoPE

# Largest values taken for a model and not for damage; the largest open models stay below an eighth of each.
MAX_LAYERS, MAX_WIDTH, MAX_HEADS, MAX_HEAD_SIZE = 1 << 12, 1 << 20, 1 << 14, 1 << 12
MAX_FFN, MAX_CONTEXT, MAX_THETA, MAX_FACTOR = 1 << 23, 1 << 30, 1e15, 1e6
MAX_NAME = 200  # characters of a name that are shown


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder. exit_layers: layers after which the model was trained to exit early, counted from 1 (3:
    after the first three), ascending, all below `layers`."""

    architecture: str
    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool
    exit_layers: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def q_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads and checks the configuration, and the names and shapes of all tensors.

    UnsupportedModelError: an architecture or feature that is not computed here. CorruptModelError: a key or tensor is
    missing, of the wrong type or shape, or has a value that no model has.
    """
    keys = _Keys(file)
    architecture = keys.architecture
    _refuse_features(keys)
    layers = keys.integer("block_count", 1, MAX_LAYERS)
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    heads = keys.same_for_all_layers("attention.head_count", 1, MAX_HEADS)
    kv_heads = keys.same_for_all_layers("attention.head_count_kv", 1, MAX_HEADS, default=heads)
    if heads % kv_heads:
        keys.corrupt("attention.head_count_kv", f"{heads} heads cannot share {kv_heads} kv heads evenly")
    head_size = _head_size(keys, width, heads)
    context_length = keys.integer("context_length", 1, MAX_CONTEXT)
    config = ModelConfig(
        architecture=architecture,
        name=_name(file),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=keys.same_for_all_layers("feed_forward_length", 1, MAX_FFN),
        vocab_size=_vocab_size(keys, width),
        context_length=context_length,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        rope=_rope(keys, head_size, context_length),
        qkv_bias=architecture == "qwen2" or layer_names(0).q_bias in file.tensors,
        qk_norm=architecture == "qwen3",
        tied_head=HEAD not in file.tensors,
        exit_layers=_exit_layers(keys, layers),
    )
    check_tensors(file, config)
    return config


def _name(file: GGUFFile) -> str:
    """The name that the file gives, fit for a terminal; else the file's own."""
    name = file.metadata.get("general.name")
    shown = "".join(c if c.isprintable() else " " for c in name[:MAX_NAME]).strip() if isinstance(name, str) else ""
    return shown or file.path.stem


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Compares the file's tensors with what `config` needs.

    CorruptModelError names what is missing or misshaped; UnsupportedModelError a tensor that the computation would
    leave out, such as an expert's or an output bias.
    """
    expected = _expected_tensors(config)
    optional = {ROPE_FACTORS: (config.rope.dimension_count // 2,)}
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptModelError(file.path, file.metadata.end, f"tensor {missing[0]!r} is missing{more}")
    for name, info in file.tensors.items():
        shape = expected.get(name) or optional.get(name)
        if shape is None:
            if name.endswith("rope_freqs") or name.endswith(".attn_rot_embd") or name.endswith("rotary_emb.inv_freq"):
                continue  # frequencies that old exports carry; they follow from rope.freq_base
            raise unsupported(f"tensor {name!r} in a model of architecture {config.architecture}")
        if info.shape != shape:
            raise CorruptModelError(file.path, info.offset, f"tensor {name!r} has the shape {list(info.shape)}, "
                                                            f"the metadata asks for {list(shape)}")
        if len(shape) == 1 and not info.format.is_float:
            raise unsupported(f"tensor type {info.type} of the vector {name!r}", ("F32", "F16", "BF16"))
    rope_factors(file, config)


def rope_factors(file: GGUFFile, config: ModelConfig) -> np.ndarray | None:
    """The divisors of the RoPE frequencies, float32 [dimension_count / 2], or None where the file has none."""
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = file.floats(ROPE_FACTORS)
    if not (np.isfinite(factors).all() and (factors > 0).all() and (factors <= MAX_FACTOR).all()):
        raise CorruptModelError(file.path, file.tensors[ROPE_FACTORS].offset, f"{ROPE_FACTORS} holds divisors that are "
                                                                              f"not within 0 and {MAX_FACTOR:g}")
    return factors


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, head_size = config.width, config.head_size
    q_width, kv_width = config.q_width, config.kv_width
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width), OUTPUT_NORM: (width,)}
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, width)
    for layer in range(config.layers):
        names = layer_names(layer)
        shapes |= {
            names.attn_norm: (width,),
            names.q: (q_width, width),
            names.k: (kv_width, width),
            names.v: (kv_width, width),
            names.o: (width, q_width),
            names.ffn_norm: (width,),
            names.gate: (config.ffn, width),
            names.up: (config.ffn, width),
            names.down: (width, config.ffn),
        }
        if config.qkv_bias:
            shapes |= {names.q_bias: (q_width,), names.k_bias: (kv_width,), names.v_bias: (kv_width,)}
        if config.qk_norm:
            shapes |= {names.q_norm: (head_size,), names.k_norm: (head_size,)}
    return shapes


class _Keys:
    """The metadata of one architecture, with a check for each kind of value."""

    def __init__(self, file: GGUFFile):
        self.file, self.metadata = file, file.metadata
        self.architecture = ""
        self._refuse_parts()
        name = self._get("general.architecture")
        if not isinstance(name, str):
            self._refuse("general.architecture", f"is of type {self.metadata.type_name('general.architecture')}")
        if name not in ARCHITECTURES:
            shown = name if len(name) <= 40 else name[:37] + "..."
            raise unsupported(f"architecture {shown!r}", tuple(ARCHITECTURES))
        self.architecture = name

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def corrupt(self, key: str, reason: str) -> Any:
        return self._refuse(f"{self.architecture}.{key}", reason)

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        if default is not None and not self.has(key):
            return default
        return self._integer(f"{self.architecture}.{key}", least, most)

    def number(self, key: str, least: float, most: float, default: float | None = None) -> float:
        full = f"{self.architecture}.{key}"
        if default is not None and full not in self.metadata:
            return default
        value = self._get(full)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(full, f"is of type {self.metadata.type_name(full)}, not a number")
        if not math.isfinite(value) or not least <= value <= most:
            self._refuse(full, f"is {value}, not within {least:g} and {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        full = f"{self.architecture}.{key}"
        value = self._get(full)
        if not isinstance(value, bool):
            self._refuse(full, f"is of type {self.metadata.type_name(full)}, not true or false")
        return value

    def text(self, key: str, default: str) -> str:
        full = f"{self.architecture}.{key}"
        if full not in self.metadata:
            return default
        value = self._get(full)
        if not isinstance(value, str):
            self._refuse(full, f"is of type {self.metadata.type_name(full)}, not a string")
        return value

    def same_for_all_layers(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """A number, or an array of one number per layer that are all equal."""
        full = f"{self.architecture}.{key}"
        if not self.has(key) or self.metadata.type_name(full) != "array":
            return self.integer(key, least, most, default)
        if self.metadata.length(full) > MAX_LAYERS:
            self._refuse(full, f"has {self.metadata.length(full)} values, one for each layer")
        values = self._get(full)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.size == 0:
            self._refuse(full, "is not an array of whole numbers")
        if (values != values[0]).any():
            raise unsupported(f"{full} that differs between layers")
        if not least <= int(values[0]) <= most:
            self._refuse(full, f"is {values[0]}, not within {least} and {most}")
        return int(values[0])

    def _refuse_parts(self) -> None:
        """First of all: later parts of a split model and files that are no models lack the keys of a model."""
        key = "split.count"
        if key in self.metadata and self._integer(key, 0, 1 << 16) > 1:
            raise unsupported(f"a model split into {self.metadata[key]} files", ("one file",),
                              "Make one of them: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf. Or:")
        kind = self.metadata.get("general.type", "model")
        if isinstance(kind, str) and kind != "model":
            raise UnsupportedModelError(f"a GGUF file of type {kind[:40]!r}", ("model",), "It belongs to a model, and "
                                        "is none: open the model's own file.")

    def _integer(self, full: str, least: int, most: int) -> int:
        value = self._get(full)
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(full, f"is of type {self.metadata.type_name(full)}, not a whole number")
        if not least <= value <= most:
            self._refuse(full, f"is {value}, not within {least} and {most}")
        return value

    def _get(self, full: str) -> Any:
        if full not in self.metadata:
            raise CorruptModelError(self.file.path, self.metadata.end, f"metadata key {full!r} is missing")
        return self.metadata[full]

    def _refuse(self, full: str, reason: str) -> Any:
        raise CorruptModelError(self.file.path, self.metadata.offset(full), f"{full} {reason}")


def _refuse_features(keys: _Keys) -> None:
    if keys.integer("expert_count", 0, 1 << 30, default=0):
        raise unsupported("a mixture of experts", ("dense feed-forward layers",))
    window = keys.integer("attention.sliding_window", 0, 1 << 32, default=0)
    if 0 < window < keys.integer("context_length", 1, MAX_CONTEXT):
        raise unsupported(f"a sliding window of {window} tokens", ("full attention",))
    if keys.number("attention.scale", 0.0, MAX_FACTOR, default=0.0):
        raise unsupported(f"{keys.architecture}.attention.scale")
    for key in ("logit_scale", "embedding_scale", "residual_scale", "attn_logit_softcapping",
                "final_logit_softcapping", "attention.clamp_kqv"):  # fmt: skip
        if keys.has(key) and keys.number(key, -1e30, 1e30) not in (0.0, 1.0):
            raise unsupported(f"{keys.architecture}.{key}")
    if keys.has("attention.causal") and not keys.flag("attention.causal"):
        raise unsupported("attention that is not causal", ("causal attention",))


def _head_size(keys: _Keys, width: int, heads: int) -> int:
    if keys.has("attention.key_length"):
        head_size = keys.integer("attention.key_length", 1, MAX_HEAD_SIZE)
    else:
        if width % heads:
            keys.corrupt("attention.head_count", f"is {heads}, which does not divide the width {width}")
        head_size = width // heads
        if head_size > MAX_HEAD_SIZE:
            keys.corrupt("attention.head_count", f"is {heads}: heads of {head_size} values exceed {MAX_HEAD_SIZE}")
    if head_size % 2:
        keys.corrupt("attention.key_length", f"is {head_size}: RoPE needs an even head size")
    value_length = keys.integer("attention.value_length", 1, MAX_HEAD_SIZE, default=head_size)
    if value_length != head_size:
        raise unsupported(f"a value head size of {value_length} beside a key head size of {head_size}")
    return head_size


def _vocab_size(keys: _Keys, width: int) -> int:
    """Rows of the embedding. The token list must name as many; `vocab_size` counts only where there is no list, since
    exporters leave the number of before padding there."""
    embedding = keys.file.tensors.get(EMBEDDING)
    if embedding is None:
        raise CorruptModelError(keys.file.path, keys.metadata.end, f"tensor {EMBEDDING!r} is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] != width:
        raise CorruptModelError(keys.file.path, embedding.offset, f"tensor {EMBEDDING!r} has the shape "
                                f"{list(embedding.shape)}, the metadata asks for [vocabulary, {width}]")
    rows = embedding.shape[0]
    tokens = "tokenizer.ggml.tokens"
    if tokens in keys.metadata and keys.metadata.type_name(tokens) == "array":
        count = keys.metadata.length(tokens)
        if count != rows:
            keys._refuse(tokens, f"names {count} tokens, the embedding has {rows} rows")
    elif keys.integer("vocab_size", 1, 1 << 31, default=rows) != rows:
        keys.corrupt("vocab_size", f"does not match the {rows} rows of the embedding")
    return rows


def _rope(keys: _Keys, head_size: int, context_length: int) -> RopeConfig:
    dimensions = keys.integer("rope.dimension_count", 1, MAX_HEAD_SIZE, default=head_size)
    if dimensions != head_size:
        raise unsupported(f"RoPE over {dimensions} of a head's {head_size} values", ("RoPE over whole heads",))
    rope = RopeConfig(
        theta=keys.number("rope.freq_base", 1.001, MAX_THETA, default=10000.0),
        dimension_count=dimensions,
        style=ARCHITECTURES[keys.architecture],
        attn_factor=keys.number("rope.scaling.attn_factor", 1e-6, MAX_FACTOR, default=1.0),
        original_context=context_length,
    )
    factor = keys.number("rope.scaling.factor", 0.0, MAX_FACTOR, default=0.0)
    factor = factor or keys.number("rope.scale_linear", 0.0, MAX_FACTOR, default=0.0) or 1.0
    if factor < 1e-6:
        keys.corrupt("rope.scaling.factor", f"is {factor}")
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(f"RoPE scaling {kind[:40]!r}", ("none", "linear", "yarn", "llama3 (rope_freqs.weight)"))
    if kind == "yarn":
        original = keys.integer("rope.scaling.original_context_length", 0, MAX_CONTEXT, default=0)
        beta_fast = keys.number("rope.scaling.yarn_beta_fast", 1e-3, MAX_FACTOR, default=32.0)
        return replace(
            rope,
            scaling="yarn",
            factor=factor,
            original_context=original or context_length,
            ext_factor=keys.number("rope.scaling.yarn_ext_factor", 0.0, 1.0, default=1.0),
            beta_fast=beta_fast,
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1e-3, beta_fast, default=1.0),
        )
    if kind == "linear" and factor != 1.0:
        return replace(rope, scaling="linear", factor=factor)
    return replace(rope, scaling="llama3" if ROPE_FACTORS in keys.file.tensors else "none")


def _exit_layers(keys: _Keys, layers: int) -> tuple[int, ...]:
    key = "edge.early_exit.layers"
    if key not in keys.metadata:
        return ()
    if keys.metadata.type_name(key) != "array" or keys.metadata.length(key) >= MAX_LAYERS:
        keys._refuse(key, "is not an array of layer numbers")
    values = keys.metadata[key]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        if len(values) == 0:
            return ()
        keys._refuse(key, "is not an array of layer numbers")
    exits = tuple(int(value) for value in values)
    if any(not 1 <= e < layers for e in exits) or list(exits) != sorted(set(exits)):
        keys._refuse(key, f"is {list(exits)[:16]}: not ascending numbers from 1 to {layers - 1}")
    return exits
