"""A 4-bit copy of a small head, for drafts: they need not be exact, only cheap, and a check follows.

In a small model the head, kept in 8 bits for its quality, weighs as much as several layers, and a draft runs it after
few of them. In a large one a copy would cost more memory than drafts are worth.
"""
from __future__ import annotations

import numpy as np

from edge_runtime.devices.cpu.weights import PackedMatrix
from edge_runtime.kernels import pack_tiles
from edge_runtime.kernels.compile import Progress
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.team import Operation, Program, Team
from edge_runtime.kernels.tiles import matrix_bytes
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.quant.quantize import quantize

TYPE = "Q4_0"
BLOCK = 32
MOST_BYTES = 8 << 20


class DraftHead:
    """The head `matrix` in 4 bits. Keeps its memory alive."""

    def __init__(self, file: GGUFFile, matrix: PackedMatrix, team: Team, progress: Progress | None):
        source = quantize(file.floats(matrix.name), TYPE)
        self._memory = aligned(matrix_bytes(TYPE, matrix.rows, matrix.inputs), np.uint8)
        self.matrix = PackedMatrix(f"{matrix.name} (drafts)", TYPE, matrix.rows, matrix.inputs,
                                   self._memory.ctypes.data)
        team.run(Program([Operation(f"pack {self.matrix.name}", pack_tiles.pack_kernel(TYPE, progress),
                                    pack_tiles.operands(
            counter=0, source=source.ctypes.data, source_row_bytes=source.nbytes // matrix.rows, rows=matrix.rows,
            inputs=matrix.inputs, target=self.matrix.address, block_row_bytes=self.matrix.row_bytes))]))


def worth_a_copy(matrix: PackedMatrix) -> bool:
    """Whether drafts get a head of their own: it is small, and larger than 4 bits."""
    size = matrix_bytes(TYPE, matrix.rows, matrix.inputs) if matrix.inputs % BLOCK == 0 else MOST_BYTES + 1
    return size <= MOST_BYTES and size < 0.8 * matrix_bytes(matrix.type, matrix.rows, matrix.inputs)
