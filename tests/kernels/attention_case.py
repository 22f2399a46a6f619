"""A step's rows, pages and tables for the attention kernels, and how to run them: shared by the attention tests."""
from __future__ import annotations

import ctypes
import threading

import numpy as np

from edge_runtime.kernels import attention_decode, attention_prefill, attention_reference, rope, step_state
from edge_runtime.kernels.attention_tasks import AttentionTasks
from edge_runtime.kernels.kv_record import TOKENS, RecordLayout
from edge_runtime.kernels.memory import aligned, operands


def call(address: int, blocks: list[np.ndarray], threads: int = 1) -> None:
    """Runs a kernel with each operand block in turn; the team is `threads` Python threads."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)
    for block in blocks:
        if threads == 1:
            function(block.ctypes.data, 0, 1)
            continue
        team = [threading.Thread(target=function, args=(block.ctypes.data, t, threads)) for t in range(threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()


class Case:
    """Slices (position, rows) of random sequences; KV of the tokens before them is written by the NumPy oracle."""

    def __init__(self, slices, head_size=64, group=4, kv_heads=2, dtype="int8", seed=0, layers=2, layer=1, scale=1.0):
        rng = np.random.default_rng(seed)
        self.layout = RecordLayout(dtype, head_size)
        self.head_size, self.group, self.kv_heads = head_size, group, kv_heads
        self.heads, self.dtype, self.layers = group * kv_heads, dtype, layers
        self.offset = layer * kv_heads * self.layout.bytes
        self.rows = sum(rows for _, rows in slices)
        self.counter = aligned(8, np.int64)
        self.state = np.zeros(len(step_state.NAMES), np.int64)
        self.slices = np.zeros((len(slices), 4), np.int64)
        self.pages, self.tables, self.k, self.v = [], [], [], []
        first = 0
        for i, (position, rows) in enumerate(slices):
            count = -(-(position + rows) // TOKENS)
            # 0xff everywhere: NaN scales and halves wherever nothing was written.
            pages = [aligned(layers * kv_heads * self.layout.bytes, np.uint8) for _ in range(count)]
            for page in pages:
                page[:] = 255
            table = np.array([page.ctypes.data for page in pages], np.int64)
            self.pages.append(pages)
            self.tables.append(table)
            self.slices[i] = first, rows, position, table.ctypes.data
            first += rows
            total = position + rows
            self.k.append((scale * rng.standard_normal((total, kv_heads, head_size))).astype(np.float32))
            self.v.append(rng.standard_normal((total, kv_heads, head_size)).astype(np.float32))
        self.q = rng.standard_normal((self.rows, self.heads, head_size)).astype(np.float32)

    def record(self, sequence: int, page: int, head: int) -> np.ndarray:
        start = self.offset + head * self.layout.bytes
        return self.pages[sequence][page][start:start + self.layout.bytes]

    def fill(self) -> Case:
        """Writes all KV with the oracle."""
        for s, (k, v) in enumerate(zip(self.k, self.v)):
            for t in range(len(k)):
                for head in range(self.kv_heads):
                    attention_reference.write_token(self.record(s, t // TOKENS, head), self.layout, t % TOKENS,
                                                    k[t, head], v[t, head])
        return self

    def unpacked(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """K, V [tokens, K, D] as stored."""
        count = len(self.k[sequence])
        heads = []
        for head in range(self.kv_heads):
            parts = [attention_reference.unpack(self.record(sequence, p, head), self.layout)
                     for p in range(len(self.pages[sequence]))]
            heads.append([np.concatenate(x)[:count] for x in zip(*parts)])
        return tuple(np.stack(x, 1) for x in zip(*heads))

    def expected(self, stored: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """o [rows, H, D], lse [rows, H] of the oracle, on the stored KV or on the original one."""
        parts = []
        for s, (first, rows, position, _) in enumerate(self.slices.tolist()):
            k, v = self.unpacked(s) if stored else (self.k[s], self.v[s])
            parts.append(attention_reference.attend(self.q[first:first + rows], k, v, position))
        return tuple(np.concatenate(x) for x in zip(*parts))

    def attend(self, kind: str, threads: int = 1, layers: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Runs the decode or prefill kernel over all rows; `layers` times with the same tables."""
        tasks = AttentionTasks(self.head_size, self.group, self.kv_heads)
        tasks.build(self.slices, len(self.slices) if kind == "decode" else 0)
        tasks.write(self.state)
        room = attention_decode if kind == "decode" else attention_prefill
        size = getattr(room, f"{kind}_scratch_bytes")(self.head_size, self.group, self.dtype)
        stride = -(-size // 64) * 64
        scratch = aligned(stride * threads, np.uint8)
        scratch[:] = 255
        out = np.full((self.rows, self.heads * self.head_size + 5), np.nan, np.float32)
        lse = np.full((self.rows, self.heads), np.nan, np.float32)
        q = np.full((self.rows, self.heads * self.head_size + 3), np.nan, np.float32)
        q[:, :-3] = self.q.reshape(self.rows, -1)
        self.counter[:] = 0
        kernel = getattr(room, f"attention_{kind}_kernel")(self.head_size, self.group, self.dtype)
        block = operands(
            room.OPERANDS, counter=self.counter.ctypes.data, step=self.state.ctypes.data, q=q.ctypes.data,
            q_stride=q.strides[0], kv_heads=self.kv_heads, record_offset=self.offset, out=out.ctypes.data,
            out_stride=out.strides[0], lse=lse.ctypes.data, scratch=scratch.ctypes.data, scratch_stride=stride)
        for _ in range(layers):
            self.counter[:] = 0
            call(kernel, [block], threads)
        assert np.isnan(out[:, -5:]).all()
        return out[:, :-5].reshape(self.rows, self.heads, self.head_size).copy(), lse

    def write_with_kernel(self, cos, sin, rotary, style, norms=None, eps=1e-6, threads=1) -> np.ndarray:
        """Runs the RoPE kernel on [q, k, v] of the slices' rows; returns qkv [rows, H + 2 K, D] afterwards."""
        width = (self.heads + 2 * self.kv_heads) * self.head_size
        qkv = np.full((self.rows, width + 7), np.nan, np.float32)
        for s, (first, rows, position, _) in enumerate(self.slices.tolist()):
            parts = (self.q[first:first + rows], self.k[s][position:], self.v[s][position:])
            qkv[first:first + rows, :width] = np.concatenate([p.reshape(rows, -1) for p in parts], 1)
        table = np.ascontiguousarray(np.stack([cos, sin], 1), dtype=np.float32)
        self.state[step_state.ROPE] = table.ctypes.data
        self.state[step_state.SLICES], self.state[step_state.SLICE_COUNT] = self.slices.ctypes.data, len(self.slices)
        self.counter[:] = 0
        q_norm, k_norm = norms if norms is not None else (np.zeros(1, np.float32),) * 2
        block = operands(
            rope.OPERANDS, counter=self.counter.ctypes.data, step=self.state.ctypes.data, qkv=qkv.ctypes.data,
            stride=qkv.strides[0], kv_heads=self.kv_heads, record_offset=self.offset, q_norm=q_norm.ctypes.data,
            k_norm=k_norm.ctypes.data)
        call(rope.rope_kernel(self.head_size, self.group, self.dtype, rotary, style, norms is not None, eps), [block],
             threads)
        return qkv[:, :width].reshape(self.rows, -1, self.head_size)
