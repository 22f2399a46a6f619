"""The memory a step works in: rows of activations, allocated once for the most rows a step may carry."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.kernels import matmul_amx, step_state
from edge_runtime.kernels.memory import aligned
from edge_runtime.models.config import ModelConfig


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class Widths:
    """Floats per row of each buffer: inputs padded to 32, outputs of matrices to 16 each."""

    x: int
    heads: int
    attention: int
    ffn: int
    logits: int

    @classmethod
    def of(cls, config: ModelConfig) -> Widths:
        return cls(x=padded(config.width, 32), heads=padded(config.q_width + 2 * config.kv_width, 16),
                   attention=padded(config.q_width, 32), ffn=padded(config.ffn, 32),
                   logits=padded(config.vocab_size, 16))

    @property
    def qkv(self) -> int:
        """Heads stand without gaps; the last matrix may write up to 15 values past them."""
        return self.heads + 16

    @property
    def widest(self) -> int:
        return max(self.x, self.attention, self.ffn)


def working_bytes(config: ModelConfig, max_rows: int, threads: int, matrix_tiles: bool,
                  float_rows: bool = False) -> int:
    """What `Buffers` will take, logits of one row per sequence not counted."""
    w, rows = Widths.of(config), padded(max_rows, 16) + 16
    floats = w.x + w.qkv + w.attention + 2 * w.ffn + (w.widest if float_rows else 0)
    int8 = 2 * w.widest * 12 // 8
    tiles = w.widest * 2 + threads * matmul_amx.scratch_bytes(rows) // rows if matrix_tiles else 0
    return rows * (4 * floats + int8 + tiles)


class Buffers:
    """Arrays of a step. x: the residual stream [rows, width]; q, scales, sums, halves: activations in int8;
    tiles: the same in bf16; rows_f32: the same in float32. Logits grow with what a step asks for."""

    def __init__(self, config: ModelConfig, max_rows: int, threads: int, matrix_tiles: bool, float_rows: bool):
        """float_rows: some matrices are not quantized and read their rows in float32."""
        self.widths = w = Widths.of(config)
        self.rows = rows = padded(max_rows, 16) + 16  # products write whole tiles of 16 rows
        floats = lambda width: aligned(rows * width, np.float32)
        self.state = aligned(len(step_state.NAMES), np.int64)
        self.x, self.qkv, self.attention = floats(w.x), floats(w.qkv), floats(w.attention)
        self.gate, self.up = floats(w.ffn), floats(w.ffn)
        self.plain = floats(w.widest) if float_rows else aligned(1, np.float32)
        # Twice, for the second pass of activations in two: its arrays follow those of the first.
        self.int8 = aligned(2 * rows * w.widest, np.int8)
        self.scales = aligned(2 * rows * w.widest // 32, np.float32)
        self.sums = aligned(2 * rows * w.widest // 32, np.int32)
        self.halves = aligned(2 * rows * w.widest // 16, np.int32)
        self.int8_low, self.scale_low, self.half_low = (a.nbytes // 2 for a in (self.int8, self.scales, self.halves))
        self.tiles = aligned(rows * w.widest if matrix_tiles else 1, np.uint16)
        self.zeros = aligned(max(w.logits, w.qkv, w.ffn, w.x), np.float32)
        self.row_scratch_bytes = padded(w.widest * 4, 64)
        self.row_scratch = aligned(threads * self.row_scratch_bytes, np.uint8)
        self.product_scratch_bytes = padded(matmul_amx.scratch_bytes(rows), 4096) if matrix_tiles else 0
        self.product_scratch = aligned(threads * self.product_scratch_bytes + 64, np.uint8, 4096)
        self.tile_config = matmul_amx.tile_config()
        self.token_ids = aligned(rows, np.int32)
        self.logit_index = aligned(rows, np.int32)
        self.hidden_index = aligned(rows, np.int32)
        self.logits = aligned(w.logits, np.float32).reshape(1, -1)
        self.hidden = aligned(w.x, np.float32).reshape(1, -1)
        self.state[step_state.TOKEN_IDS] = self.token_ids.ctypes.data
        self.state[step_state.LOGIT_INDEX] = self.logit_index.ctypes.data
        self.state[step_state.HIDDEN_INDEX] = self.hidden_index.ctypes.data

    def reserve_logits(self, rows: int) -> None:
        """Room for the logits of `rows` rows; keeps what is there only if it is enough."""
        if len(self.logits) < rows:
            self.logits = aligned(rows * self.widths.logits, np.float32).reshape(rows, -1)

    def reserve_hidden(self, rows: int) -> None:
        if len(self.hidden) < rows:
            self.hidden = aligned(rows * self.widths.x, np.float32).reshape(rows, -1)
