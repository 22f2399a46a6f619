"""Weights as the CPU's kernels read them: every matrix packed once, the file's pages given back on the way."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_runtime.kernels import pack_tiles
from edge_runtime.kernels.compile import Progress
from edge_runtime.kernels.huge_memory import HugeMemory
from edge_runtime.kernels.team import Operation, Program, Team
from edge_runtime.kernels.tiles import FLOAT_FORMATS, FORMATS, matrix_bytes, row_blocks
from edge_runtime.models.config import ModelConfig
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.names import EMBEDDING, HEAD, layer_names

GROUP_BYTES = 32 << 20  # packed at a time: what a load holds beyond the packed weights


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, inputs] in kernel tiles. type: GGML type; address of [row blocks][row_bytes]."""

    name: str
    type: str
    rows: int
    inputs: int
    address: int

    @property
    def row_blocks(self) -> int:
        return row_blocks(self.rows)

    @property
    def padded_rows(self) -> int:
        return self.row_blocks * 16

    @property
    def row_bytes(self) -> int:
        return matrix_bytes(self.type, self.rows, self.inputs) // self.row_blocks

    @property
    def is_float(self) -> bool:
        return self.type in FLOAT_FORMATS

    @property
    def blocks(self) -> int:
        """Blocks of a row, for quantized types."""
        return self.inputs // FORMATS[self.type].block_inputs


def matrix_names(config: ModelConfig) -> list[str]:
    """Every matrix that is multiplied with, in the order of use."""
    names = []
    for i in range(config.layers):
        layer = layer_names(i)
        names += [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
    return [*names, EMBEDDING if config.tied_head else HEAD]


def packed_bytes(file: GGUFFile, config: ModelConfig) -> int:
    """Memory that `PackedWeights` takes."""
    total = 0
    for name in matrix_names(config):
        info = file.tensors[name]
        total += _aligned(matrix_bytes(info.type, *info.shape))
    return total


class PackedWeights:
    """All matrices of a model in one anonymous mapping (huge pages where the system gives them)."""

    def __init__(self, file: GGUFFile, config: ModelConfig, team: Team, progress: Progress | None = None):
        names = matrix_names(config)
        self.nbytes = packed_bytes(file, config)
        self._memory = HugeMemory(self.nbytes)
        at = self._memory.address
        self.matrices: dict[str, PackedMatrix] = {}
        for name in names:
            info = file.tensors[name]
            rows, inputs = info.shape
            self.matrices[name] = PackedMatrix(name, info.type, rows, inputs, at)
            at += _aligned(matrix_bytes(info.type, rows, inputs))
        for group in _groups(self.matrices.values()):
            self._pack(file, group, team, progress)
            for name in {piece.matrix.name for piece in group}:
                file.release(name)

    def _pack(self, file: GGUFFile, group: list[_Piece], team: Team, progress: Progress | None) -> None:
        operations, views = [], []
        for piece in group:
            matrix, source = piece.matrix, file.data(piece.matrix.name)
            views.append(source)
            kernel, row_bytes = pack_tiles.pack_kernel(matrix.type, progress), source.nbytes // matrix.rows
            operations.append(Operation(f"pack {matrix.name}", kernel, pack_tiles.operands(
                counter=0, source=source.ctypes.data + piece.first * 16 * row_bytes, source_row_bytes=row_bytes,
                rows=min(piece.count * 16, matrix.rows - piece.first * 16), inputs=matrix.inputs,
                target=matrix.address + piece.first * matrix.row_bytes, block_row_bytes=matrix.row_bytes),
                barrier=False))
        team.run(Program(operations))

    def close(self) -> None:
        self.matrices.clear()
        self._memory.close()


def _aligned(size: int) -> int:
    return -(-size // 4096) * 4096


@dataclass(frozen=True)
class _Piece:
    """Row blocks first .. first + count - 1 of a matrix."""

    matrix: PackedMatrix
    first: int
    count: int


def _groups(matrices: Iterable[PackedMatrix]) -> Iterable[list[_Piece]]:
    """Pieces of GROUP_BYTES together; a matrix that is larger is cut."""
    group: list[_Piece] = []
    room = GROUP_BYTES
    for matrix in matrices:
        first = 0
        while first < matrix.row_blocks:
            count = min(matrix.row_blocks - first, max(1, room // matrix.row_bytes))
            group.append(_Piece(matrix, first, count))
            first, room = first + count, room - count * matrix.row_bytes
            if room < matrix.row_bytes:
                yield group
                group, room = [], GROUP_BYTES
    if group:
        yield group
