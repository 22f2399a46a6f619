"""A Hugging Face folder (llama, qwen2, qwen3 in safetensors) rewritten as a float GGUF file, which every room reads."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import CorruptModelError
from edge_runtime.models.gguf_writer import TensorSource, array_tensor, write_gguf
from edge_runtime.models.hf_config import HFConfig, read_hf_config
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, ROPE_FACTORS, layer_names
from edge_runtime.models.rope import pairs_from_halves
from edge_runtime.models.safetensors_file import SafetensorsFolder
from edge_runtime.models.unsupported import unsupported
from edge_runtime.quant.formats import block_format

Progress = Callable[[int, int], object]

_LAYER = {
    "input_layernorm.weight": "attn_norm", "self_attn.q_proj.weight": "q", "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v", "self_attn.o_proj.weight": "o", "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias", "self_attn.v_proj.bias": "v_bias", "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm", "post_attention_layernorm.weight": "ffn_norm", "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up", "mlp.down_proj.weight": "down",
}  # fmt: skip
_QK_NORMS = ("q_norm", "k_norm")
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type, llama.h
_IGNORED = ("rotary_emb.inv_freq",)  # follows from the config


def write_folder(folder: str | os.PathLike[str], target: str | os.PathLike[str], tokenizer: Mapping[str, Any],
                 progress: Progress | None = None) -> Path:
    """Writes the folder's model as a GGUF file of its own float types and returns the path. tokenizer: the metadata
    `tokenizer.*`. progress: called with the weights done and their total.

    ModelNotFoundError, CorruptModelError (with the file and byte), UnsupportedModelError: what `config.json` or a
    tensor asks for is not computed here. The target appears when it is complete.
    """
    folder = Path(folder)
    config = read_hf_config(folder)
    with SafetensorsFolder(folder) as files:
        if config.tied_head is None:
            config = replace(config, tied_head="lm_head.weight" not in files.tensors)
        names = _names(files, config)
        _check(files, names, config)
        done, total = 0, sum(int(np.prod(files.tensors[theirs].shape)) for theirs in names.values())

        def count(weights: int) -> None:
            nonlocal done
            done += weights
            if progress:
                progress(done, total)

        tensors = [_source(files, ours, theirs, config, count) for ours, theirs in names.items()]
        if config.factors is not None:
            tensors.append(array_tensor(ROPE_FACTORS, config.factors))
        kind = files.tensors[names[layer_names(0).q]].dtype
        metadata = {"general.architecture": config.architecture, "general.type": "model", "general.name": config.name,
                    "general.file_type": _FILE_TYPES[kind], **config.metadata, **tokenizer}
        return write_gguf(target, metadata, tensors)


def _names(files: SafetensorsFolder, config: HFConfig) -> dict[str, str]:
    """Our name -> the folder's, of every tensor of the model; those of the folder that mean nothing are left out."""
    # Base models are saved without the "model." of the class around them.
    prefix = "model." if any(name.startswith("model.") for name in files.tensors) else ""
    names = {EMBEDDING: f"{prefix}embed_tokens.weight", OUTPUT_NORM: f"{prefix}norm.weight"}
    if not config.tied_head:
        names[HEAD] = "lm_head.weight"
    for layer in range(config.layers):
        ours = vars(layer_names(layer))
        for theirs, field in _LAYER.items():
            absent = (theirs.endswith(".bias") and not config.qkv_bias) or (field in _QK_NORMS and not config.qk_norm)
            if not absent:
                names[ours[field]] = f"{prefix}layers.{layer}.{theirs}"
    return names


def _check(files: SafetensorsFolder, names: Mapping[str, str], config: HFConfig) -> None:
    missing = [theirs for theirs in names.values() if theirs not in files.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptModelError(files.folder, 0, f"tensor {missing[0]!r} is missing{more}")
    used = set(names.values())
    for name in files.tensors:
        if name in used or name.endswith(_IGNORED) or (config.tied_head and name == "lm_head.weight"):
            continue
        if name.endswith("o_proj.bias") and not files.floats(name).any():
            continue  # attention_bias of llama gives all four; zeros change nothing
        raise unsupported(f"tensor {name!r} in a model of architecture {config.architecture}")
    sizes = config.metadata
    width, ffn = (sizes[f"{config.architecture}.{key}"] for key in ("embedding_length", "feed_forward_length"))
    q, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    shapes = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q), "gate": (ffn, width),
              "up": (ffn, width), "down": (width, ffn), "attn_norm": (width,), "ffn_norm": (width,), "q_bias": (q,),
              "k_bias": (kv,), "v_bias": (kv,), "q_norm": (config.head_size,), "k_norm": (config.head_size,)}
    fields = {name: field for layer in range(config.layers) for field, name in vars(layer_names(layer)).items()}
    top = {EMBEDDING: (config.vocab_size, width), HEAD: (config.vocab_size, width), OUTPUT_NORM: (width,)}
    for ours, theirs in names.items():
        tensor, wanted = files.tensors[theirs], top.get(ours) or shapes[fields[ours]]
        if tensor.shape != wanted:
            raise CorruptModelError(tensor.path, tensor.offset, f"tensor {theirs!r} has the shape "
                                    f"{list(tensor.shape)}, config.json asks for {list(wanted)}")
        files.raw(theirs)  # refuses other types than floats


def _source(files: SafetensorsFolder, ours: str, theirs: str, config: HFConfig,
            count: Callable[[int], None]) -> TensorSource:
    tensor = files.tensors[theirs]
    format = block_format(tensor.dtype if len(tensor.shape) > 1 else "F32")

    def chunks() -> Iterable[np.ndarray]:
        words = files.raw(theirs) if len(tensor.shape) > 1 else files.floats(theirs)
        if config.architecture == "llama" and ours.rpartition(".")[0].endswith((".attn_q", ".attn_k")):
            words = pairs_from_halves(words, config.heads if ".attn_q." in ours else config.kv_heads)
        yield np.ascontiguousarray(words)
        count(words.size)

    return TensorSource(ours, tensor.shape, format, chunks)
