"""A trained folder as GGUF: the `llama` architecture with tokenizer and chat template, matrices quantized by ours.

`python -m edge_runtime.models.recipes.export --from FOLDER --out FILE.gguf [--type Q4_0] [--head Q8_0]`. Names and
metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `edge.early_exit.layers` is ours.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import gguf
import numpy as np
from tokenizers import Tokenizer

from edge_runtime.quant.quantize import quantize

from .bpe import CHAT_TEMPLATE, END, END_OF_TEXT, PRE_TOKENIZER, SPECIAL_TOKENS, START
from .config import NetworkConfig
from .network import Network
from .rounding import Rounding
from .train import SCALES, load_network

METHODS = ("plain", "search")

NAME = "Edge Tiny"
EXIT_LAYERS = "edge.early_exit.layers"  # uint32 array: numbers of layers after which the model can be left
DESCRIPTION = ("A small model that ships with Edge Runtime: summarizes short reports, notes and messages and answers "
               "questions about them. Trained from scratch on generated texts.")

_BLOCK_NAMES = {
    "attention_norm": "attn_norm.weight",
    "attention.q.weight": "attn_q.weight",
    "attention.k.weight": "attn_k.weight",
    "attention.v.weight": "attn_v.weight",
    "attention.o.weight": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn.gate.weight": "ffn_gate.weight",
    "ffn.up.weight": "ffn_up.weight",
    "ffn.down.weight": "ffn_down.weight",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * D, ...] from the half-split rotary order (i with i + D/2) to GGUF's (2i with 2i + 1).
    """
    rows, inputs = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def tensors(network_state: dict[str, np.ndarray], config: NetworkConfig) -> dict[str, np.ndarray]:
    """Tensors (floats, or packed rows) by their GGUF names; rows of q and k in GGUF's order."""
    named = {"token_embd.weight": network_state["embedding"], "output_norm.weight": network_state["norm"]}
    for layer in range(config.layers):
        for ours, theirs in _BLOCK_NAMES.items():
            value = network_state[f"blocks.{layer}.{ours}"]
            if theirs.startswith(("attn_q.", "attn_k.")):
                value = interleave(value, config.heads if theirs.startswith("attn_q.") else config.kv_heads)
            named[f"blk.{layer}.{theirs}"] = value
    return named


def _write_metadata(writer: gguf.GGUFWriter, config: NetworkConfig, tokenizer: Tokenizer, type_name: str,
                    exits: Sequence[int]) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(NAME)
    writer.add_basename("edge-tiny")
    writer.add_size_label(f"{config.parameters / 1e6:.1f}M")
    writer.add_author("Edge Runtime project")
    writer.add_organization("Edge Runtime project")
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "summarization"])
    names = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}
    writer.add_file_type(gguf.LlamaFileType[names.get(type_name, f"MOSTLY_{type_name}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if exits:
        writer.add_key_value(EXIT_LAYERS, list(exits), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    _write_tokenizer(writer, tokenizer)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(START))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_pad_token_id(tokens.index(END_OF_TEXT))
    # The chat template writes every <|im_start|> itself.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export(folder: pathlib.Path, out: pathlib.Path, type_name: str = "Q4_0", head_type: str = "Q8_0",
           method: str = "search", importance: Mapping[str, np.ndarray] | None = None, layers: int = 0) -> int:
    """Writes the GGUF file and returns its size in bytes.

    type_name: of the block matrices; head_type: of the embedding, which is the head too; "F32" writes floats. A folder
    trained for these types gives exactly the values that its training computed with; else the weights are rounded by
    `method` of `quant.quantize`, the search weighted by `importance` (`train.importance`). layers: only so many, the
    model that leaves at that exit; 0: all. The file appears under its name only when complete."""
    config, tokenizer, network = load_network(folder)
    rounding = Rounding.load(folder / SCALES) if (folder / SCALES).exists() and config.quantize == type_name else None
    shape = dataclasses.replace(config.network, layers=layers or config.network.layers)
    write(out, network, shape, tokenizer, exits=() if layers else config.exits, type_name=type_name,
          head_type=head_type, method=method, importance=importance, rounding=rounding)
    return out.stat().st_size


def write(out: pathlib.Path, network: Network, shape: NetworkConfig, tokenizer: Tokenizer, *, exits: Sequence[int] = (),
          type_name: str = "Q4_0", head_type: str = "Q8_0", method: str = "search",
          importance: Mapping[str, np.ndarray] | None = None, rounding: Rounding | None = None) -> None:
    """`export` of a network in memory; shape: the network's, or with fewer layers."""
    state = {}
    for name, value in network.state_dict().items():
        target = head_type if name == "embedding" else type_name
        if value.ndim == 1 or target == "F32":
            state[name] = value.numpy()
        elif rounding is not None:
            state[name] = rounding.packed(name, value)
        else:
            weights = None if importance is None else importance.get(name)
            state[name] = quantize(value.numpy(), target, weights, method=method)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _write_metadata(writer, shape, tokenizer, type_name, exits)
    for name, packed in tensors(state, shape).items():
        target = head_type if name == "token_embd.weight" else type_name
        packed = np.ascontiguousarray(packed)
        if packed.dtype == np.uint8:
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[target])
        else:
            writer.add_tensor(name, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="folder", type=pathlib.Path, required=True, help="training folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="GGUF file to write")
    parser.add_argument("--type", default="Q4_0", help="type of the matrices")
    parser.add_argument("--head", default="Q8_0", help="type of the tied embedding and head")
    parser.add_argument("--method", choices=METHODS, default="search", help="rounding of weights not trained for it")
    parser.add_argument("--layers", type=int, default=0, help="only the first so many: the model of an early exit")
    options = parser.parse_args()
    size = export(options.folder, options.out, options.type, options.head, options.method, layers=options.layers)
    print(f"{options.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
