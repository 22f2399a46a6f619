"""Which tensor of a model gets which type: llama.cpp's choices for its file types, for files that compare with its own.

Facts from llama.cpp's src/llama-quant.cpp; tests/peers holds them against its quantizer.
"""
from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.errors import UnsupportedModelError
from edge_runtime.quant.formats import BlockFormat, block_format


@dataclass(frozen=True)
class FileType:
    """number: `general.file_type` (llama.h, `enum llama_ftype`). base: the type of most matrices. more: layers in
    part get a better type for attn_v and ffn_down, "some" by `_gets_more_bits`, "first" the first few."""

    name: str
    number: int
    base: str
    more: str = ""


FILE_TYPES: dict[str, FileType] = {
    f.name: f
    for f in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q4_K_S", 14, "Q4_K", "first"),
        FileType("Q4_K_M", 15, "Q4_K", "some"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_K_M", 17, "Q5_K", "some"),
        FileType("Q6_K", 18, "Q6_K"),
    )
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where 256 does not divide a row; then F16


def file_type(name: str) -> FileType:
    """The file type of that name, in any case. UnsupportedModelError names those there are."""
    upper = str(name).upper()
    found = FILE_TYPES.get(ALIASES.get(upper, upper))
    if found is None:
        raise UnsupportedModelError(f"file type {name!r}", tuple(FILE_TYPES))
    return found


def mixed_format(type: FileType, name: str, layer: int, layers: int, inputs: int, is_head: bool) -> BlockFormat:
    """The format of a matrix with rows of `inputs`.

    name: the tensor's, such as "blk.3.attn_v.weight"; layer: its layer, or -1; is_head: the matrix that gives the
    logits, the embedding itself where it is tied.
    """
    chosen = type.base
    if not block_format(chosen).is_float:
        if is_head:
            chosen = "Q8_0" if chosen == "Q8_0" else "Q6_K"
        elif ".attn_v." in name or ".ffn_down." in name:
            if type.more == "some" and _gets_more_bits(layer, layers):
                chosen = "Q6_K"
            elif type.more == "first" and layer < (4 if ".attn_v." in name else layers // 8):
                chosen = "Q5_K"
    return fitting_format(chosen, inputs)


def fitting_format(name: str, inputs: int) -> BlockFormat:
    """The type, or what stands in for it where its block does not divide a row of `inputs`: Q5_0, Q5_1 and Q8_0 for
    Q4_K, Q5_K and Q6_K, and F16 where 32 does not divide either."""
    format = block_format(name)
    if inputs % format.block_size:
        format = block_format(FALLBACKS.get(format.name, "F16"))
    if inputs % format.block_size:
        format = block_format("F16")
    return format


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
