"""The host's half of a layer: keys and values go into its pages, queries attend over them, while a device works."""
from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_runtime.devices.base import KVLayout
from edge_runtime.devices.worker import Worker
from edge_runtime.kernels import attention_decode, attention_prefill, memory, rope
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.team import Operation, Program, Team
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.host_rows import ROTARY, HostRows

Progress = Callable[[str], None]
T = TypeVar("T")
WRITE = {name: at for at, name in enumerate(rope.OPERANDS)}
ATTEND = {name: at for at, name in enumerate(attention_decode.OPERANDS)}  # the prefill kernel's are the same


@dataclass(frozen=True)
class Attended:
    """What rows saw in the host's pages: `output` float32 [n, H * D], and where tokens were skipped `lse` float32
    [n, H], the natural logarithm of the sum of exponentials of the scores. began, ended: of the work, in seconds of
    time.perf_counter."""

    output: np.ndarray
    lse: np.ndarray | None
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class HostAttention:
    """A thread of its own, with a team of `threads`, that runs what is submitted in order and without Python's lock.

    cores: processors for these threads, all where empty.
    """

    def __init__(self, config: ModelConfig, layout: KVLayout, *, threads: int = 1, cores: tuple[int, ...] = (),
                 name: str = "edge-runtime-host", progress: Progress | None = None):
        self.config, self.layout, self.threads = config, layout, threads
        shape = (config.head_size, config.group, layout.dtype)
        write = rope.rope_kernel(*shape, rotary=ROTARY, style="norm", progress=progress)
        decode = attention_decode.attention_decode_kernel(*shape, progress=progress)
        prefill = attention_prefill.attention_prefill_kernel(*shape, progress=progress)
        scratch_bytes = -(-max(attention_decode.decode_scratch_bytes(*shape),
                               attention_prefill.prefill_scratch_bytes(*shape)) // 64) * 64
        self._scratch = aligned(threads * scratch_bytes, np.uint8)
        self._width = config.q_width + 2 * config.kv_width
        self._kernels = (("KV write", write), ("decode attention", decode), ("prompt attention", prefill))
        self._scratch_bytes = scratch_bytes
        self._store, self._decode, self._both = (self._program(count) for count in (1, 2, 3))
        self._team = Team(threads, progress)
        self._worker = Worker(name, cores)

    def submit(self, layer: int, qkv: np.ndarray, rows: HostRows) -> Future[Attended]:
        """qkv float32 [n, (H + 2K) * D], C-contiguous: queries and keys after QK norm and RoPE; it belongs to the call
        until the future is done. Writes the rows' keys and values, then attends."""
        return self._worker.submit(lambda: self._run(layer, qkv, rows))

    def store(self, layers: range, qkv: list[np.ndarray], rows: HostRows) -> Future[None]:
        """Only the writing, for rows that attend elsewhere, of all `layers` at once: one array per layer."""
        return self._worker.submit(lambda: self._stored(layers, qkv, rows))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the thread, after what was submitted before."""
        return self._worker.submit(function)

    def drain(self) -> None:
        """Waits until nothing that was submitted touches pages any more."""
        self.call(lambda: None).result()

    def close(self) -> None:
        self._worker.close()
        self._team.close()

    def _program(self, operations: int) -> Program:
        """The first of the three operations; each program has operand blocks of its own, aimed before it runs."""
        shared = dict(counter=0, step=0, kv_heads=self.config.kv_heads, record_offset=0)
        attend = dict(q=0, q_stride=4 * self._width, out=0, out_stride=4 * self.config.q_width, lse=0,
                      scratch=self._scratch.ctypes.data, scratch_stride=self._scratch_bytes, **shared)
        blocks = [memory.operands(rope.OPERANDS, qkv=0, stride=4 * self._width, q_norm=0, k_norm=0, **shared),
                  memory.operands(attention_decode.OPERANDS, **attend),
                  memory.operands(attention_prefill.OPERANDS, **attend)][:operations]
        return Program([Operation(name, kernel, block, barrier=name != "decode attention" or operations == 2)
                        for (name, kernel), block in zip(self._kernels, blocks)])

    def _run(self, layer: int, qkv: np.ndarray, rows: HostRows) -> Attended:
        began = time.perf_counter()
        program = self._decode if rows.decoded == len(rows.slices) else self._both
        output = np.empty((rows.count, self.config.q_width), np.float32)
        lse = np.empty((rows.count, self.config.heads), np.float32) if rows.partial else None
        self._aim(program, layer, qkv, rows)
        for operation in program.operations[1:]:
            block = operation.operands
            block[ATTEND["step"]], block[ATTEND["record_offset"]] = rows.attend.ctypes.data, self._offset(layer)
            block[ATTEND["q"]], block[ATTEND["out"]] = qkv.ctypes.data, output.ctypes.data
            block[ATTEND["lse"]] = 0 if lse is None else lse.ctypes.data
        self._team.run(program)
        return Attended(output, lse, began, time.perf_counter())

    def _stored(self, layers: range, qkv: list[np.ndarray], rows: HostRows) -> None:
        for layer, new in zip(layers, qkv):
            self._aim(self._store, layer, new, rows)
            self._team.run(self._store)

    def _aim(self, program: Program, layer: int, qkv: np.ndarray, rows: HostRows) -> None:
        if qkv.shape != (rows.count, self._width) or qkv.dtype != np.float32 or not qkv.flags.c_contiguous:
            raise ValueError(f"qkv {qkv.dtype} {qkv.shape}: must be float32 {(rows.count, self._width)}, C-contiguous")
        block = program.operations[0].operands
        block[WRITE["step"]], block[WRITE["record_offset"]] = rows.write.ctypes.data, self._offset(layer)
        block[WRITE["qkv"]] = qkv.ctypes.data

    def _offset(self, layer: int) -> int:
        return layer * self.layout.kv_heads * self.layout.record_bytes
