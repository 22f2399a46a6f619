"""How quantized weights lie in memory for the kernels: tiles of 16 rows x 32 inputs.

A matrix [N rows, K inputs] is stored as [N / 16] row blocks, each [K / 32] tiles in order of inputs, rows padded with
zeros. A tile holds 8 steps; step j holds inputs 4j..4j+3 of all 16 rows as 64 bytes, row-major: one dot instruction.

    codes    4 bits: 4 x 64 bytes, step i in the low nibbles and i + 4 in the high ones (as Q4_0 itself has them)
             5 bits: the same and 64 bytes more, bit j of byte i is bit 4 of step j's code i
             6 bits: the same and 2 x 64 bytes more, bits 2(j % 4).. of byte i of plane j // 4 are bits 4-5
             8 bits: 8 x 64 bytes, code + `weight_bias`
    scales   "f16": 16 float16 scales, then 16 float16 minimums where the format has them
             "k32": 16 uint8 scale codes, 16 uint8 minimum codes; a block of 8 tiles starts with 16 float16 d and
                    16 float16 dmin; scale = d * code (Q4_K, Q5_K)
             "k16": 2 x 16 int8 scale codes, one set per 16 inputs; a block of 8 tiles starts with 16 float16 d (Q6_K)
    weight   scale * (code - zero) + minimum   (minimums of "k32" are subtracted: dmin * code)
"""
from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.kernels.isa import Isa, current

ROWS, INPUTS, STEPS = 16, 32, 8


@dataclass(frozen=True)
class TileFormat:
    """name: the GGML type; bits per code; zero: subtracted from codes; scales: see above; minimum: has minimums."""

    name: str
    bits: int
    zero: int
    scales: str = "f16"
    minimum: bool = False

    @property
    def tiles_per_block(self) -> int:
        return 1 if self.scales == "f16" else 8

    @property
    def code_bytes(self) -> int:
        return 64 * self.bits

    @property
    def tile_bytes(self) -> int:
        return self.code_bytes + (64 if self.scales == "f16" and self.minimum else 32)

    @property
    def header_bytes(self) -> int:
        return {"f16": 0, "k32": 64, "k16": 32}[self.scales]

    @property
    def block_bytes(self) -> int:
        return self.header_bytes + self.tiles_per_block * self.tile_bytes

    @property
    def block_inputs(self) -> int:
        return INPUTS * self.tiles_per_block


FORMATS = {f.name: f for f in (
    TileFormat("Q4_0", 4, 8),
    TileFormat("Q4_1", 4, 0, minimum=True),
    TileFormat("Q5_0", 5, 16),
    TileFormat("Q5_1", 5, 0, minimum=True),
    TileFormat("Q8_0", 8, 128),
    TileFormat("Q4_K", 4, 0, "k32", True),
    TileFormat("Q5_K", 5, 0, "k32", True),
    TileFormat("Q6_K", 6, 32, "k16"),
)}
FLOAT_FORMATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes per weight; tiles [N / 16, K, 16], no padding of inputs


def weight_bias(isa: Isa | None = None) -> int:
    """Added to signed 8-bit codes when they are packed: dot instructions take one unsigned operand, except `sdot`."""
    return 0 if (isa or current()).dot == "sdot128" else 128


def row_blocks(rows: int) -> int:
    return -(-rows // ROWS)


def matrix_bytes(name: str, rows: int, inputs: int) -> int:
    """Bytes of a packed matrix [rows, inputs]."""
    if name in FLOAT_FORMATS:
        return row_blocks(rows) * ROWS * inputs * FLOAT_FORMATS[name]
    form = FORMATS[name]
    return row_blocks(rows) * (inputs // form.block_inputs) * form.block_bytes
