"""Block formats of GGUF tensors: how many weights a block holds, in how many bytes, under which number in the file."""
from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class BlockFormat:
    """`block_size` consecutive weights of a row are stored in `block_bytes` bytes.

    ggml_type: the number that GGUF files write for it (ggml.h, `enum ggml_type`).
    levels: codes of one weight, 0 for the float formats.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    levels: int = 0

    @property
    def is_float(self) -> bool:
        return self.levels == 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of `inputs` weights. ValueError where `inputs` is not a multiple of the block."""
        if inputs % self.block_size:
            raise ValueError(f"a row of {inputs} weights is no multiple of the {self.name} block of {self.block_size}")
        return inputs // self.block_size * self.block_bytes


FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        BlockFormat("F32", 0, 1, 4),
        BlockFormat("F16", 1, 1, 2),
        BlockFormat("BF16", 30, 1, 2),
        BlockFormat("Q4_0", 2, 32, 18, 16),  # f16 scale, 16 bytes of nibbles
        BlockFormat("Q4_1", 3, 32, 20, 16),  # f16 scale, f16 minimum, nibbles
        BlockFormat("Q5_0", 6, 32, 22, 32),  # f16 scale, 32 high bits, nibbles
        BlockFormat("Q5_1", 7, 32, 24, 32),  # f16 scale, f16 minimum, high bits, nibbles
        BlockFormat("Q8_0", 8, 32, 34, 256),  # f16 scale, 32 int8
        BlockFormat("Q4_K", 12, 256, 144, 16),  # f16 scale and minimum of 8 six-bit scales and minima, nibbles
        BlockFormat("Q5_K", 13, 256, 176, 32),  # the same and 256 high bits
        BlockFormat("Q6_K", 14, 256, 210, 64),  # nibbles, 2-bit highs, 16 int8 scales, f16 scale
    )
}
FORMATS_BY_NUMBER: dict[int, BlockFormat] = {f.ggml_type: f for f in FORMATS.values()}
# Types that ggml knows and this runtime does not compute: read so that an error can name them.
OTHER_FORMATS_BY_NUMBER: dict[int, BlockFormat] = {
    f.ggml_type: f
    for f in (
        BlockFormat("Q8_1", 9, 32, 36, 256),
        BlockFormat("Q2_K", 10, 256, 84, 4),
        BlockFormat("Q3_K", 11, 256, 110, 8),
        BlockFormat("Q8_K", 15, 256, 292, 256),
        BlockFormat("IQ2_XXS", 16, 256, 66, 4),
        BlockFormat("IQ2_XS", 17, 256, 74, 4),
        BlockFormat("IQ3_XXS", 18, 256, 98, 8),
        BlockFormat("IQ1_S", 19, 256, 50, 3),
        BlockFormat("IQ4_NL", 20, 32, 18, 16),
        BlockFormat("IQ3_S", 21, 256, 110, 8),
        BlockFormat("IQ2_S", 22, 256, 82, 4),
        BlockFormat("IQ4_XS", 23, 256, 136, 16),
        BlockFormat("I8", 24, 1, 1),
        BlockFormat("I16", 25, 1, 2),
        BlockFormat("I32", 26, 1, 4),
        BlockFormat("I64", 27, 1, 8),
        BlockFormat("F64", 28, 1, 8),
        BlockFormat("IQ1_M", 29, 256, 56, 3),
        BlockFormat("TQ1_0", 34, 256, 54, 3),
        BlockFormat("TQ2_0", 35, 256, 66, 3),
        BlockFormat("MXFP4", 39, 32, 17, 16),
        BlockFormat("NVFP4", 40, 64, 36, 16),
        BlockFormat("Q1_0", 41, 128, 18, 2),
    )
}


def block_format(name: str | BlockFormat) -> BlockFormat:
    """The format of that name, in any case. UnsupportedModelError names the formats there are."""
    if isinstance(name, BlockFormat):
        return name
    found = FORMATS.get(str(name).upper())
    if found is None:
        raise UnsupportedModelError(f"tensor type {name!r}", tuple(FORMATS))
    return found
