"""A torch `Network` from any GGUF file that the runtime loads, and back into one that carries the same tokenizer."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_runtime.errors import UnsupportedModelError
from edge_runtime.models.config import ModelConfig, config_from_gguf, rope_factors
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.gguf_writer import RawValue, array_tensor, write_gguf
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, ROPE_FACTORS, layer_names
from edge_runtime.models.rope import halves_from_pairs, pairs_from_halves

from .config import NetworkConfig
from .network import Network

EXIT_LAYERS = "edge.early_exit.layers"
# A block's parameters -> fields of models.names.LayerNames.
_BLOCK = {
    "attention_norm": "attn_norm", "attention.q.weight": "q", "attention.k.weight": "k", "attention.v.weight": "v",
    "attention.o.weight": "o", "attention.q.bias": "q_bias", "attention.k.bias": "k_bias", "attention.v.bias": "v_bias",
    "attention.q_norm": "q_norm", "attention.k_norm": "k_norm", "ffn_norm": "ffn_norm", "ffn.gate.weight": "gate",
    "ffn.up.weight": "up", "ffn.down.weight": "down",
}  # fmt: skip


def network_config(config: ModelConfig, factors: np.ndarray | None = None) -> NetworkConfig:
    """The torch network's shape for a model file's. factors: the file's RoPE divisors, float32 [head_size / 2]."""
    rope = config.rope
    plain = rope.scaling == "none" and rope.attn_factor == 1.0 and factors is None
    return NetworkConfig(
        vocab_size=config.vocab_size, width=config.width, layers=config.layers, heads=config.heads,
        kv_heads=config.kv_heads, head_size=config.head_size, ffn=config.ffn, context_length=config.context_length,
        rope_theta=rope.theta, rms_eps=config.rms_eps, plant=False, architecture=config.architecture,
        qkv_bias=config.qkv_bias, qk_norm=config.qk_norm, tied_head=config.tied_head, rope=None if plain else rope,
        rope_factors=() if factors is None else tuple(map(float, factors)))


def file_network_config(file: GGUFFile) -> NetworkConfig:
    """`network_config` of an open file."""
    config = config_from_gguf(file)
    return network_config(config, rope_factors(file, config))


def load_network_file(file: GGUFFile, layers: Sequence[int] | None = None) -> Network:
    """The file's weights, dequantized to float32, in a network whose logits are `ReferenceModel`'s.

    layers: those of the file's, from 0, that the network is made of; None: all. Raises what `config_from_gguf` raises.
    """
    whole = file_network_config(file)
    chosen = range(whole.layers) if layers is None else layers
    shape = replace(whole, layers=len(chosen))
    network = Network(shape)
    state = {}
    for ours, theirs in tensor_names(shape):
        if theirs.startswith("blk."):
            block, number, rest = theirs.split(".", 2)
            theirs = f"{block}.{chosen[int(number)]}.{rest}"
        state[ours] = torch.from_numpy(_reordered(file.floats(theirs), theirs, shape, halves_from_pairs))
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(True).eval()


def write_network_file(target: str | os.PathLike[str], network: Network, source: GGUFFile, *, name: str = "",
                       exit_layers: Sequence[int] = (), extra: Mapping[str, Any] | None = None) -> Path:
    """Writes the network as a float32 GGUF file with the tokenizer, chat template and RoPE of `source`; returns its
    path. `quantize_gguf` makes small ones of it.

    name: `general.name`, the source's unless given. extra: further metadata. UnsupportedModelError: the network's
    vocabulary or architecture is not the source's.
    """
    shape, original = network.config, config_from_gguf(source)
    if (shape.architecture, shape.vocab_size) != (original.architecture, original.vocab_size):
        raise UnsupportedModelError(
            f"a {shape.architecture} network of {shape.vocab_size} tokens with the tokenizer of a "
            f"{original.architecture} model of {original.vocab_size}", (), "Give the model it was made from.")
    state = network.state_dict()
    tensors = [array_tensor(theirs, _reordered(state[ours].detach().float().cpu().numpy(), theirs, shape,
                                               pairs_from_halves)) for ours, theirs in tensor_names(shape)]
    if shape.rope_factors:
        tensors.append(array_tensor(ROPE_FACTORS, np.array(shape.rope_factors, np.float32)))
    return write_gguf(target, _metadata(source, shape, name, exit_layers) | dict(extra or {}), tensors)


def tensor_names(shape: NetworkConfig) -> Iterator[tuple[str, str]]:
    """(parameter of the network, tensor of the file) of all weights."""
    yield "embedding", EMBEDDING
    yield "norm", OUTPUT_NORM
    if not shape.tied_head:
        yield "head", HEAD
    for layer in range(shape.layers):
        names = vars(layer_names(layer))
        for ours, field in _BLOCK.items():
            if (shape.qkv_bias or not ours.endswith(".bias")) and (shape.qk_norm or field not in ("q_norm", "k_norm")):
                yield f"blocks.{layer}.{ours}", names[field]


def _reordered(rows: np.ndarray, name: str, shape: NetworkConfig,
               order: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """q and k of an architecture that rotates neighbours go through `order`; everything else stays."""
    stem = name.rpartition(".")[0]
    if shape.architecture == "llama" and stem.endswith((".attn_q", ".attn_k")):
        rows = order(rows, shape.heads if stem.endswith("q") else shape.kv_heads)
    return np.ascontiguousarray(rows)


def _metadata(source: GGUFFile, shape: NetworkConfig, name: str, exit_layers: Sequence[int]) -> dict[str, Any]:
    """The source's, with the network's sizes."""
    # What the source was measured or quantized with says nothing of the network.
    stale = ("general.size_label", "general.parameter_count", "edge.early_exit.", "quantize.")
    pairs: dict[str, Any] = {key: RawValue(source.metadata.raw(key)) for key in source.metadata
                             if not key.startswith(stale)}
    sizes = {
        "context_length": shape.context_length, "embedding_length": shape.width, "block_count": shape.layers,
        "feed_forward_length": shape.ffn, "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads, "attention.key_length": shape.head_size,
        "attention.value_length": shape.head_size, "rope.dimension_count": shape.head_size,
        "attention.layer_norm_rms_epsilon": shape.rms_eps, "vocab_size": shape.vocab_size,
    }  # fmt: skip
    pairs |= {f"{shape.architecture}.{key}": value for key, value in sizes.items()}
    pairs |= {"general.file_type": 0, "general.parameter_count": shape.parameters}
    if name:
        pairs["general.name"] = name
    if exit_layers:
        pairs[EXIT_LAYERS] = list(map(int, exit_layers))
    return pairs
