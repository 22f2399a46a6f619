"""A model's step as a list of operations: what is multiplied with what, in which buffers, and where threads wait."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.devices.cpu.attention import AttentionOperations
from edge_runtime.devices.cpu.buffers import Buffers, padded
from edge_runtime.devices.cpu.weights import PackedMatrix, PackedWeights
from edge_runtime.kernels import embed, matmul_amx, matmul_float, matmul_tiles, rows, step_state
from edge_runtime.kernels.compile import Progress
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.team import Operation, Program
from edge_runtime.models.config import ModelConfig
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, layer_names

CLAIM_BYTES = 128 << 10  # of weights, taken at a time: long enough to stream, short enough to share


@dataclass(frozen=True)
class Output:
    """Where a product goes: float32 rows `stride` floats apart; init: what sums start from (strides in floats)."""

    address: int
    stride: int
    init: int
    init_stride: int


class ProgramBuilder:
    """Collects the operations of one model. The arrays they point to live as long as the builder's owner."""

    def __init__(self, file: GGUFFile, config: ModelConfig, weights: PackedWeights, buffers: Buffers,
                 attention: AttentionOperations, threads: int, progress: Progress | None):
        self.file, self.config, self.weights, self.buffers = file, config, weights, buffers
        self.attention, self.threads, self.progress = attention, threads, progress
        self.operations: list[Operation] = []
        self.kept: list[np.ndarray] = []
        self._vectors: dict[tuple[str, int], int] = {}
        self.matrix_tiles = current().matrix_tiles
        self.prompts = True  # whether the rows of the program may be a prompt's: else their kernels are left out
        self.eps = self._keep(np.array([config.rms_eps], np.float32))

    def build(self) -> tuple[Program, dict[str, tuple[np.ndarray, int]]]:
        """The whole step, and where it keeps the addresses that change with a step: "logits" and "hidden", each an
        operand block and the index of the address in it."""
        self.embed()
        for i in range(self.config.layers):
            self.layer(i)
        hidden = self.hidden_states()
        logits = self.head()
        return self.take(), {"logits": logits, "hidden": hidden}

    def take(self) -> Program:
        """The operations so far as a program; the next one begins empty."""
        operations, self.operations = self.operations, []
        return Program(operations)

    # parts of a step
    def layer(self, i: int) -> None:
        c, buffers, w, names = self.config, self.buffers, self.buffers.widths, layer_names(i)
        matrix = lambda name: self.weights.matrices[name]
        residual = self._output(buffers.x, w.x, residual=True)
        self._rows("attention norm", rows.NORM, buffers.x, w.x, c.width, self._norm(names.attn_norm, w.x),
                   [matrix(names.q), matrix(names.k), matrix(names.v)], passes=2)
        at = 0
        for name, bias, last in ((names.q, names.q_bias, False), (names.k, names.k_bias, False),
                                 (names.v, names.v_bias, True)):
            m = matrix(name)
            # Heads stand without gaps: where 16 does not divide a matrix, its last tile writes into the next
            # one's columns, which must therefore be written later.
            self._product(m, self._output(buffers.qkv, w.qkv, at, bias=bias if c.qkv_bias else None, matrix=m),
                          barrier=last or m.padded_rows != m.rows, passes=2)
            at += m.rows
        attend = self.attention.layer(i, self._vector(names.q_norm), self._vector(names.k_norm))
        if not self.prompts:
            rope, decode, _ = attend
            attend = [rope, replace(decode, barrier=True)]
        self.operations += attend
        self._rows("attention output", rows.COPY, buffers.attention, w.attention, c.q_width, None, [matrix(names.o)])
        self._product(matrix(names.o), residual)
        self._rows("ffn norm", rows.NORM, buffers.x, w.x, c.width, self._norm(names.ffn_norm, w.x),
                   [matrix(names.gate), matrix(names.up)])
        self._product(matrix(names.gate), self._output(buffers.gate, w.ffn), barrier=False)
        self._product(matrix(names.up), self._output(buffers.up, w.ffn))
        self._rows("silu", rows.SILU, buffers.gate, w.ffn, c.ffn, buffers.up.ctypes.data, [matrix(names.down)])
        self._product(matrix(names.down), residual)

    def keys_and_values(self, i: int) -> None:
        """Layer `i` of rows that only leave K and V there: decoded ones."""
        c, buffers, w, names = self.config, self.buffers, self.buffers.widths, layer_names(i)
        key, value = self.weights.matrices[names.k], self.weights.matrices[names.v]
        self._rows("attention norm", rows.NORM, buffers.x, w.x, c.width, self._norm(names.attn_norm, w.x),
                   [key, value], passes=2, all_few=True)
        at = c.q_width
        for m, bias, last in ((key, names.k_bias, False), (value, names.v_bias, True)):
            self._product(m, self._output(buffers.qkv, w.qkv, at, bias=bias if c.qkv_bias else None, matrix=m),
                          barrier=last or m.padded_rows != m.rows, rows_at=step_state.FEW_ROWS, passes=2)
            at += m.rows
        self.operations += self.attention.layer(i, self._vector(names.q_norm), self._vector(names.k_norm))[:1]

    def hidden_states(self) -> tuple[np.ndarray, int]:
        c, buffers, w = self.config, self.buffers, self.buffers.widths
        block = self._rows("hidden states", rows.NORM, buffers.x, w.x, c.width, self._norm(OUTPUT_NORM, w.x), [],
                           step_state.HIDDEN_ROWS, step_state.HIDDEN_INDEX, out=buffers.hidden)
        return block, rows.OUT

    @property
    def head_matrix(self) -> PackedMatrix:
        return self.weights.matrices[EMBEDDING if self.config.tied_head else HEAD]

    def head(self, matrix: PackedMatrix | None = None) -> tuple[np.ndarray, int]:
        """Final norm and head of the rows that LOGIT_INDEX names. matrix: instead of the model's own."""
        c, buffers, w = self.config, self.buffers, self.buffers.widths
        head = self.head_matrix if matrix is None else matrix
        self._rows("output norm", rows.NORM, buffers.x, w.x, c.width, self._norm(OUTPUT_NORM, w.x), [head],
                   step_state.LOGIT_ROWS, step_state.LOGIT_INDEX, all_few=True)
        logits = self._product(head, self._output(buffers.logits, w.logits), rows_at=step_state.LOGIT_ROWS)
        return logits, matmul_float.Y if head.is_float else matmul_tiles.Y

    def add(self, name: str, kernel: int, block: np.ndarray) -> None:
        self._add(name, kernel, block)

    # vectors
    def _keep(self, array: np.ndarray) -> int:
        self.kept.append(array)
        return array.ctypes.data

    def _vector(self, name: str) -> int:
        """Address of a float32 vector of the file, 0 where it has none."""
        if name not in self.file.tensors:
            return 0
        if (name, 0) not in self._vectors:
            self._vectors[name, 0] = self._keep(self.file.floats(name))
        return self._vectors[name, 0]

    def _norm(self, name: str, width: int) -> int:
        """Address of a vector padded with zeros to `width`."""
        if (name, width) not in self._vectors:
            vector = aligned(width, np.float32)
            values = self.file.floats(name)
            vector[:len(values)] = values
            self._vectors[name, width] = self._keep(vector)
        return self._vectors[name, width]

    def _output(self, buffer: np.ndarray, stride: int, column: int = 0, *, residual: bool = False,
                bias: str | None = None, matrix: PackedMatrix | None = None) -> Output:
        address = buffer.ctypes.data + 4 * column
        if residual:
            return Output(address, stride, address, stride)
        if bias is not None and matrix is not None and bias in self.file.tensors:
            return Output(address, stride, self._norm(bias, matrix.padded_rows), 0)
        return Output(address, stride, self.buffers.zeros.ctypes.data, 0)

    # operations
    def _add(self, name: str, kernel: int, block: np.ndarray, barrier: bool = True) -> np.ndarray:
        self.operations.append(Operation(name, kernel, block, barrier))
        return block

    def embed(self) -> None:
        info, b = self.file.tensors[EMBEDDING], self.buffers
        table = self.file.data(EMBEDDING)
        self.kept.append(table)
        self._add("embed", embed.embed_kernel(info.type, self.progress), embed.operands(
            counter=0, step=b.state.ctypes.data, table=table.ctypes.data, row_bytes=table.nbytes // info.shape[0],
            width=info.shape[1], x=b.x.ctypes.data, x_stride=b.widths.x * 4))

    def _rows(self, name: str, kind: int, source: np.ndarray, stride: int, width: int, other: int | None,
              readers: list[PackedMatrix], rows_at: int = step_state.ROWS, index_at: int = step_state.ZERO, *,
              all_few: bool = False, out: np.ndarray | None = None, passes: int = 1) -> np.ndarray:
        """`readers`: the matrices that read the result; they decide its forms. passes: int8 vectors per row."""
        b, k = self.buffers, padded(width, 32)
        forms = rows.FLOAT if out is not None or any(m.is_float for m in readers) else 0
        if any(not m.is_float for m in readers):
            forms |= rows.INT8 | (rows.BF16_TILE if self.matrix_tiles and self.prompts and not all_few else 0)
            forms |= rows.INT8_TWICE if passes == 2 else 0
        return self._add(name, rows.rows_kernel(self.progress), rows.operands(
            counter=0, step=b.state.ctypes.data, rows_at=rows_at, index_at=index_at, kind=kind,
            a=source.ctypes.data, a_stride=stride * 4, b=other or 0, b_stride=stride * 4, width=k, true_width=width,
            eps=self.eps, forms=forms, q=b.int8.ctypes.data, q_stride=k, q_scale=b.scales.ctypes.data,
            q_scale_stride=k // 8, q_sum=b.sums.ctypes.data, q_half=b.halves.ctypes.data, q_half_stride=k // 4,
            bf16=b.tiles.ctypes.data, bf16_tiles=k // 32, out=(b.plain if out is None else out).ctypes.data,
            out_stride=k * 4, scratch=b.row_scratch.ctypes.data, scratch_stride=b.row_scratch_bytes,
            q_low=b.int8_low, scale_low=b.scale_low, half_low=b.half_low))

    def _product(self, matrix: PackedMatrix, output: Output, barrier: bool = True,
                 rows_at: int | None = None, passes: int = 1) -> np.ndarray:
        """rows_at: None for all rows of the step, decoded ones and prompts by their own kernels. passes: int8 vectors
        per decoded row."""
        b, k = self.buffers, padded(matrix.inputs, 32)
        state = b.state.ctypes.data
        chunk = max(2, min(CLAIM_BYTES // matrix.row_bytes, matrix.row_blocks // (4 * self.threads))) // 2 * 2
        shared = dict(counter=0, step=state, weights=matrix.address, row_blocks=matrix.row_blocks, init=output.init,
                      init_stride=output.init_stride * 4, y=output.address, y_stride=output.stride * 4)
        if matrix.is_float:
            return self._add(matrix.name, matmul_float.product_kernel(matrix.type, self.progress),
                             matmul_float.operands(
                                 rows_at=step_state.ROWS if rows_at is None else rows_at, inputs=matrix.inputs,
                                 chunk=chunk, x=b.plain.ctypes.data, x_stride=k * 4, **shared), barrier)
        both = rows_at is None and self.matrix_tiles and self.prompts
        if rows_at is None:
            rows_at = step_state.FEW_ROWS if both else step_state.ROWS
        kernel = matmul_tiles.product_kernel(matrix.type, self.progress, passes)
        few = self._add(matrix.name, kernel, matmul_tiles.operands(
            rows_at=rows_at, row_bytes=matrix.row_bytes, blocks=matrix.blocks, chunk=chunk, x=b.int8.ctypes.data,
            x_stride=k, x_scale=b.scales.ctypes.data, x_scale_stride=k // 8, x_sum=b.sums.ctypes.data,
            x_half=b.halves.ctypes.data, x_half_stride=k // 4, x_low=b.int8_low, scale_low=b.scale_low,
            half_low=b.half_low, **shared), barrier and not both)
        if both:
            self._add(matrix.name + " (tiles)", matmul_amx.product_kernel(matrix.type, self.progress),
                      matmul_amx.operands(
                          rows_at=step_state.MANY_ROWS, first_at=step_state.FEW_ROWS, row_bytes=matrix.row_bytes,
                          inputs=matrix.inputs, x=b.tiles.ctypes.data, scratch=b.product_scratch.ctypes.data,
                          scratch_stride=b.product_scratch_bytes, config=b.tile_config.ctypes.data, **shared), barrier)
        return few
