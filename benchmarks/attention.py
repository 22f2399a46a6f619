"""Attention over paged KV: bandwidth of decode as a share of what plain loads reach, arithmetic rate of prefill.

    python benchmarks/attention.py [--threads N] [--json]

JSON: rows {"name", "value", "must", "goal", "better", "detail"}. Decode rows are percent of the read bandwidth that
was measured beside them; prefill rows are TFLOPS of all threads (4 * D operations per query, head and visible token).
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.kernels import attention_decode, attention_prefill, step_state
from edge_runtime.kernels.attention_tasks import AttentionTasks
from edge_runtime.kernels.compile import compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.kv_record import RecordLayout
from edge_runtime.kernels.memory import aligned, fetch_add, i64_at, operands
from edge_runtime.kernels.vector_ir import c64, fill, i64, micro_kernel, vec

CHUNK = 1 << 20  # bytes of memory that a thread claims at a time when bandwidth is measured
POOL_BYTES = 640 << 20  # of KV per decode case: beyond the caches


def make_read() -> Callable:
    """Reads a region once with plain loads."""

    def body(e, address, sink):
        zero = [fill(0, i64, 8)] * 4
        with e.loop(c64(CHUNK // 256), zero) as loop:
            at = e.at(address, e.b.mul(loop.index, c64(256)))
            loop.next = [e.b.xor(s, e.load(at, 64 * k, vec(i64, 8))) for k, s in enumerate(loop.state)]
        total = loop.result[0]
        for other in loop.result[1:]:
            total = e.b.xor(total, other)
        e.store(sink, 0, total)

    read_chunk = micro_kernel(body)

    def read(op, thread, threads):
        counter, address, chunks, sink = i64_at(op, 0), i64_at(op, 1), i64_at(op, 2), i64_at(op, 3)
        i = fetch_add(counter, 1)
        while i < chunks:
            read_chunk(address + i * CHUNK, sink + thread * 64)
            i = fetch_add(counter, 1)

    return read


class Program:
    """Kernels with their operand blocks, run by a team of Python threads; counters are zeroed before each run."""

    def __init__(self, threads: int):
        self.threads, self.calls, self.counters = threads, [], aligned(8 * 256, np.int64)

    def counter(self) -> int:
        return self.counters.ctypes.data + 64 * len(self.calls)

    def add(self, address: int, block: np.ndarray) -> None:
        signature = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        self.calls.append((signature(address), block))

    def seconds(self) -> float:
        """Processor time of a thread, on average: what other programs on the machine take of it does not count."""
        self.counters[:] = 0
        gate, taken = threading.Barrier(self.threads), [0.0] * self.threads

        def work(thread: int) -> None:
            gate.wait()
            began = time.thread_time()
            for function, block in self.calls:
                function(block.ctypes.data, thread, self.threads)
            taken[thread] = time.thread_time() - began

        team = [threading.Thread(target=work, args=(t,)) for t in range(self.threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        return sum(taken) / self.threads


@dataclass(frozen=True)
class Shape:
    head_size: int
    group: int
    kv_heads: int
    dtype: str


class Workload:
    """Sequences (position, rows) whose pages lie in random places of one pool; layers are walked one after another."""

    def __init__(self, shape: Shape, slices: list[tuple[int, int]], layers: int, kind: str, threads: int):
        rng = np.random.default_rng(0)
        layout = RecordLayout(shape.dtype, shape.head_size)
        page = layers * shape.kv_heads * layout.bytes
        counts = [-(-(position + rows) // 64) for position, rows in slices]
        self.bytes = sum(counts) * page
        self.pool = aligned(self.bytes, np.uint8, 2 << 20)
        if shape.dtype == "int8":
            self.pool.view(np.uint32)[:] = 0x3C3C3C3C  # as a scale: 0.0115
        else:
            self.pool.view(np.uint32)[:] = 0x2E2E2E2E  # as a half: 0.0965
        order = rng.permutation(sum(counts)) * page + self.pool.ctypes.data
        self.tables = np.split(order.astype(np.int64), np.cumsum(counts)[:-1])
        rows = [r for _, r in slices]
        first = np.cumsum(rows) - rows
        table = np.array([[f, r, p, t.ctypes.data] for f, (p, r), t in zip(first, slices, self.tables)], np.int64)
        self.tasks = AttentionTasks(shape.head_size, shape.group, shape.kv_heads)
        self.tasks.build(table, len(slices) if kind == "decode" else 0)
        self.step = np.zeros(len(step_state.NAMES), np.int64)
        self.tasks.write(self.step)
        width = shape.head_size * shape.group * shape.kv_heads
        self.q = rng.standard_normal((sum(rows), width)).astype(np.float32)
        self.out = np.zeros((sum(rows), width), np.float32)
        room = attention_decode if kind == "decode" else attention_prefill
        size = getattr(room, f"{kind}_scratch_bytes")(shape.head_size, shape.group, shape.dtype)
        stride = -(-size // 4096) * 4096
        self.scratch = aligned(stride * threads, np.uint8)
        kernel = getattr(room, f"attention_{kind}_kernel")(shape.head_size, shape.group, shape.dtype)
        self.program = Program(threads)
        for layer in range(layers):
            self.program.add(kernel, operands(
                room.OPERANDS, counter=self.program.counter(), step=self.step.ctypes.data, q=self.q.ctypes.data,
                q_stride=self.q.strides[0], kv_heads=shape.kv_heads,
                record_offset=layer * shape.kv_heads * layout.bytes, out=self.out.ctypes.data,
                out_stride=self.out.strides[0], lse=0, scratch=self.scratch.ctypes.data, scratch_stride=stride))
        seen = sum(r * p + r * (r + 1) // 2 for p, r in slices)
        self.operations = 4 * seen * width * layers


def read_program(pool: np.ndarray, threads: int) -> Program:
    program = Program(threads)
    program.sink = aligned(8 * threads, np.int64)
    program.add(compile_kernel("benchmark_read", make_read), np.array(
        [program.counter(), pool.ctypes.data, len(pool) // CHUNK, program.sink.ctypes.data], np.int64))
    return program


def decode_row(shape: Shape, tokens: int, threads: int, repeats: int) -> dict:
    layout = RecordLayout(shape.dtype, shape.head_size)
    sequence = -(-tokens // 64) * shape.kv_heads * layout.bytes
    layers = max(1, min(16, POOL_BYTES // sequence))
    batch = max(1, POOL_BYTES // (sequence * layers))
    load = Workload(shape, [(tokens - 1, 1)] * batch, layers, "decode", threads)
    read = read_program(load.pool, threads)
    load.program.seconds()
    read.seconds()
    pairs = [(load.program.seconds(), read.seconds()) for _ in range(repeats)]
    attention, plain = (statistics.median(x) for x in zip(*pairs))
    read_bytes = len(load.pool) // CHUNK * CHUNK
    rate, limit = load.bytes / attention / 1e9, read_bytes / plain / 1e9
    # Runs are interleaved and compared pair by pair: neighbours on the machine take bandwidth from both.
    share = statistics.median(load.bytes / a / (read_bytes / p) for a, p in pairs)
    must, goal = (45, 70) if shape.dtype == "int8" else (65, 85)
    return {"name": f"decode_{shape.dtype}_d{shape.head_size}_g{shape.group}_{tokens // 1024}k",
            "value": round(100 * share, 1), "must": must, "goal": goal, "better": "higher",
            "detail": f"% of read bandwidth: {rate:.1f} of {limit:.1f} GB/s, batch {batch}, {layers} layers, "
                      f"{threads} threads, {current().name}"}


def prefill_row(shape: Shape, tokens: int, threads: int, repeats: int, position: int = 0) -> dict:
    load = Workload(shape, [(position, tokens)], 2, "prefill", threads)
    load.program.seconds()
    seconds = statistics.median(load.program.seconds() for _ in range(repeats))
    per_thread = {"amx": (0.4, 0.5), "avx512vnni": (0.08, 0.16)}.get(current().name, (0.01, 0.03))
    return {"name": f"prefill_{shape.dtype}_d{shape.head_size}_g{shape.group}_{tokens}"
                    + (f"_at_{position}" if position else ""),
            "value": round(load.operations / seconds / 1e12, 3), "must": per_thread[0] * threads,
            "goal": per_thread[1] * threads, "better": "higher",
            "detail": f"TFLOPS, {seconds / 2 * 1e3:.2f} ms a layer, {threads} threads, {current().name}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="part of a row's name")
    options = parser.parse_args()
    shapes = [(64, 4, 8), (64, 7, 2), (128, 4, 8), (128, 8, 8)]
    cases: list[tuple[str, Callable[[], dict]]] = []
    for dtype in ("int8", "fp16"):
        for shape in (Shape(*s, dtype) for s in shapes):
            for tokens in (4096, 8192, 16384, 32768) if shape.head_size == 64 and shape.group == 4 else (4096, 32768):
                cases.append((f"decode_{dtype}_d{shape.head_size}_g{shape.group}_{tokens // 1024}k", (
                    lambda s=shape, t=tokens: decode_row(s, t, options.threads, options.repeats))))
            for tokens, position in ((512, 0), (2048, 0), (512, 4096)):
                name = f"prefill_{dtype}_d{shape.head_size}_g{shape.group}_{tokens}" + (
                    f"_at_{position}" if position else "")
                cases.append((name, lambda s=shape, t=tokens, p=position: prefill_row(
                    s, t, options.threads, options.repeats, p)))
    rows = []
    for name, case in cases:
        if options.only in name:
            rows.append(case())
            if not options.json:
                row = rows[-1]
                print(f"{row['name']:32} {row['value']:8} (must {row['must']:.2f}, goal {row['goal']:.2f})  "
                      f"{row['detail']}", flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
