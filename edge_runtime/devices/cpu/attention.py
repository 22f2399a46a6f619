"""The attention of a step: RoPE and KV write, decoded rows, rows of prompts; and the tables these kernels share."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edge_runtime.devices.base import KVLayout, SequenceSlice
from edge_runtime.devices.cpu.buffers import Buffers, padded
from edge_runtime.kernels import attention_decode, attention_prefill, memory, rope, step_state
from edge_runtime.kernels.attention_tasks import AttentionTasks
from edge_runtime.kernels.compile import Progress
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.team import Operation
from edge_runtime.models.config import ModelConfig, rope_inverse_frequencies


class AttentionOperations:
    """Makes the operations of each layer, and fills their tables before a step."""

    def __init__(self, config: ModelConfig, layout: KVLayout, buffers: Buffers, threads: int,
                 factors: np.ndarray | None, progress: Progress | None):
        self.config, self.layout, self.buffers = config, layout, buffers
        shape = (config.head_size, config.group, layout.dtype)
        self._angles = RopeTable(config, factors)
        self._rope = aligned(buffers.rows * self._angles.width, np.float32).reshape(buffers.rows, -1)
        self._slices = np.zeros((buffers.rows, 4), np.int64)
        self._tasks = AttentionTasks(config.head_size, config.group, config.kv_heads)
        self._write = rope.rope_kernel(*shape, rotary=config.rope.dimension_count, style=config.rope.style,
                                       qk_norm=config.qk_norm, eps=config.rms_eps, progress=progress)
        self._decode = attention_decode.attention_decode_kernel(*shape, progress=progress)
        self._prefill = attention_prefill.attention_prefill_kernel(*shape, progress=progress)
        self._scratch_bytes = padded(max(attention_decode.decode_scratch_bytes(*shape),
                                         attention_prefill.prefill_scratch_bytes(*shape)), 64)
        self._scratch = aligned(threads * self._scratch_bytes, np.uint8)
        buffers.state[step_state.ROPE] = self._rope.ctypes.data
        buffers.state[step_state.SLICES] = self._slices.ctypes.data

    def layer(self, index: int, q_norm: int, k_norm: int) -> list[Operation]:
        """q_norm, k_norm: addresses of the QK norms' weights, 0 where the model has none."""
        b, stride = self.buffers, self.buffers.widths.qkv * 4
        shared = dict(counter=0, step=b.state.ctypes.data, kv_heads=self.config.kv_heads,
                      record_offset=index * self.config.kv_heads * self.layout.record_bytes)
        attend = dict(q=b.qkv.ctypes.data, q_stride=stride, out=b.attention.ctypes.data,
                      out_stride=b.widths.attention * 4, lse=0, scratch=self._scratch.ctypes.data,
                      scratch_stride=self._scratch_bytes, **shared)
        return [
            Operation("rope, KV write", self._write, memory.operands(
                rope.OPERANDS, qkv=b.qkv.ctypes.data, stride=stride, q_norm=q_norm, k_norm=k_norm, **shared)),
            Operation("decode attention", self._decode, memory.operands(attention_decode.OPERANDS, **attend), False),
            Operation("prompt attention", self._prefill, memory.operands(attention_prefill.OPERANDS, **attend)),
        ]

    def plan(self, slices: Sequence[SequenceSlice], firsts: Sequence[int]) -> None:
        """Fills the tables. firsts: the first row of each slice; decoded slices have the lowest rows."""
        table, decoded = self._slices, 0
        order = sorted(range(len(slices)), key=lambda i: firsts[i])
        for at, i in enumerate(order):
            s = slices[i]
            table[at] = (firsts[i], len(s.token_ids), s.position, s.pages.ctypes.data)
            decoded += not s.prompt
            self._angles.fill(self._rope[firsts[i]:firsts[i] + len(s.token_ids)], s.position)
        state = self.buffers.state
        state[step_state.SLICE_COUNT] = len(slices)
        self._tasks.build(table[:len(slices)], decoded)
        self._tasks.write(state)

    # For programs that fill the tables of decoded rows themselves
    @property
    def angle_bytes(self) -> int:
        return 4 * self._angles.width

    def angles_until(self, positions: int) -> int:
        """Address of cosines and sines of positions 0 .. positions - 1, `angle_bytes` apart; good until the next
        step."""
        return self._angles.address(positions)

    def reserve(self, positions: Iterable[int]) -> None:
        """Memory for the attention of decoded rows at `positions`."""
        self._tasks.reserve(positions)
        self._tasks.write(self.buffers.state)


class RopeTable:
    """Cosines and sines of positions, float32 [position, 2 * pairs], computed once and as far as they are needed."""

    def __init__(self, config: ModelConfig, factors: np.ndarray | None):
        self._frequencies, self._scale = rope_inverse_frequencies(config.rope, factors)
        self.width = 2 * len(self._frequencies)
        self._table = np.empty((0, self.width), np.float32)

    def fill(self, rows: np.ndarray, position: int) -> None:
        """rows float32 [n, width]: those of positions position .. position + n - 1."""
        end = position + len(rows)
        if end > len(self._table):
            self._grow(max(1024, 1 << (end - 1).bit_length()))
        rows[:] = self._table[position:end]

    def address(self, positions: int) -> int:
        if positions > len(self._table):
            self._grow(max(1024, 1 << (positions - 1).bit_length()))
        return self._table.ctypes.data

    def _grow(self, positions: int) -> None:
        start = len(self._table)
        angles = np.arange(start, positions, dtype=np.float64)[:, None] * self._frequencies.astype(np.float64)
        more = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * self._scale
        self._table = np.concatenate([self._table, more.astype(np.float32)])
