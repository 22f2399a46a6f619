"""KV on the device: slabs of rows, one row a sequence, each of a capacity from a ladder of classes.

A slab holds, for every layer, keys and values float32 [R, K, C, D], which GroupQueryAttention reads and extends in
place. Where the host cannot point into the middle of a device's memory, a call covers the slab's first rows: rows that
have no part in it write one token past their end, which is why C has room to spare there; and a prompt needs a slab of
one row (the operator takes chunks after the first one at a time), from which the sequence moves when it decodes in
company.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.devices.onnx.arrays import Value
from edge_runtime.devices.onnx.memory import Memory
from edge_runtime.errors import OutOfMemoryError

SMALLEST = 128  # tokens; classes are this times 1, 1.5, 2, 3, 4, 6, 8 ...: at most a third stands empty
SPARE = 64  # of capacity where rows without a part write past their end
BATCH_ROWS = 32  # of a slab
SLAB_SHARE = 4  # a slab of several rows takes at most this part of the budget


@dataclass(eq=False)
class Slab:
    """buffers: keys and values of every layer, [rows, K, capacity + spare, D]."""

    number: int
    rows: int
    capacity: int
    nbytes: int
    buffers: list[tuple[Value, Value]]
    free: list[int] = field(default_factory=list)  # descending: low rows first
    tenants: dict[int, DeviceSequence] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)  # rows that had a tenant

    def idle_positions(self, rows: range) -> list[int]:
        """Where each row may be written without harm: behind what it holds and what a step under way appends."""
        return [self.tenants[row].length + 1 if row in self.tenants else 0 for row in rows]


@dataclass(eq=False)
class DeviceSequence:
    """See `accelerator.KVSequence`."""

    slab: Slab
    row: int
    length: int = 0
    closed: bool = False

    @property
    def capacity(self) -> int:
        return self.slab.capacity

    @property
    def order(self) -> tuple[int, int]:
        return self.slab.number, self.row


def capacity_class(tokens: int, context: int) -> int:
    """Room that a sequence gets which wants `tokens`, where none is longer than `context`."""
    size = SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, -(-context // 64) * 64)


class DeviceKVPool:
    """See `accelerator.DeviceKV`. context: tokens that one sequence can have."""

    def __init__(self, memory: Memory, layers: int, kv_heads: int, head_size: int, budget_bytes: int, context: int):
        self.memory, self.layers, self.kv_heads, self.head_size = memory, layers, kv_heads, head_size
        self.budget_bytes, self.context = int(budget_bytes), context
        self._spare = 0 if memory.shared else SPARE
        self._slabs: list[Slab] = []
        self._numbers = 0

    @property
    def used_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_size * 4

    def bytes_for(self, tokens: int) -> int:
        return (self.class_of(tokens) + self._spare) * self.token_bytes

    def class_of(self, tokens: int) -> int:
        """The capacity of a sequence that wants room for `tokens`."""
        if not 0 <= tokens <= self.context:
            raise ValueError(f"{tokens} tokens: a sequence of this device has 0 to {self.context}")
        return capacity_class(tokens, self.context)

    def can_open(self, tokens: int, count: int = 1) -> bool:
        capacity = self.class_of(tokens)
        rows = sum(len(slab.free) for slab in self._slabs if slab.capacity == capacity)
        return (count - rows) * self.bytes_for(tokens) <= self.budget_bytes - self.used_bytes

    def open(self, tokens: int) -> DeviceSequence:
        return self._open(tokens, BATCH_ROWS if self.memory.shared else 1)

    def grow(self, sequence: DeviceSequence, tokens: int) -> None:
        self._check(sequence)
        if tokens > sequence.capacity:
            self._move(sequence, self._open(tokens, BATCH_ROWS if self.memory.shared else 1), sequence.length)

    def close(self, sequence: DeviceSequence) -> None:
        if not sequence.closed:
            sequence.closed = True
            self._give_back(sequence.slab, sequence.row)

    def read(self, sequence: DeviceSequence, start: int, stop: int) -> np.ndarray:
        self._check(sequence, stop)
        out = np.empty((self.layers, 2, self.kv_heads, stop - start, self.head_size), np.float32)
        for layer, buffers in enumerate(sequence.slab.buffers):
            for part, buffer in enumerate(buffers):
                out[layer, part] = self.memory.read(buffer, sequence.row, start, stop)
        return out

    def write(self, sequence: DeviceSequence, start: int, kv: np.ndarray, layers: range | None = None) -> None:
        layers = range(self.layers) if layers is None else layers
        want = (len(layers), 2, self.kv_heads, kv.shape[3] if kv.ndim == 5 else -1, self.head_size)
        if kv.shape != want:
            raise ValueError(f"KV of shape {kv.shape}: this device's is [L, 2, K, n, D] with {want}")
        end = start + kv.shape[3]
        self._check(sequence, end)
        for at, layer in enumerate(layers):
            for part, buffer in enumerate(sequence.slab.buffers[layer]):
                self.memory.write(buffer, sequence.row, start, kv[at, part])
        sequence.length = max(sequence.length, end)

    def copy(self, source: DeviceSequence, target: DeviceSequence, tokens: int) -> None:
        self._check(source, tokens)
        self._check(target, tokens)
        self._copy(source, target, tokens)
        target.length = tokens

    def alone(self, sequence: DeviceSequence, tokens: int) -> None:
        """To a slab of one row, with its first `tokens` tokens, where prompts need that."""
        if not self.memory.shared and sequence.slab.rows > 1:
            self._move(sequence, self._open(sequence.capacity, 1), tokens)

    def together(self, sequences: Sequence[DeviceSequence]) -> None:
        """Sequences of one capacity into slabs of several rows, as far as the budget has room: they decode in one
        call."""
        if self.memory.shared or len(sequences) < 2:
            return
        for sequence in sequences:
            if sequence.slab.rows == 1:
                try:
                    target = self._open(sequence.capacity, BATCH_ROWS)
                except OutOfMemoryError:
                    return
                if target.slab.rows == 1:  # no room for a slab of several
                    self.close(target)
                    return
                self._move(sequence, target, min(sequence.length + 1, sequence.capacity))

    def clear(self) -> None:
        self._slabs.clear()

    def _open(self, tokens: int, rows: int) -> DeviceSequence:
        capacity = self.class_of(tokens)
        for slab in self._slabs:
            if slab.capacity == capacity and slab.free and (self.memory.shared or (slab.rows > 1) == (rows > 1)):
                return self._seat(slab)
        return self._seat(self._new_slab(capacity, rows))

    def _seat(self, slab: Slab) -> DeviceSequence:
        sequence = DeviceSequence(slab, slab.free.pop())
        slab.tenants[sequence.row] = sequence
        if self.memory.shared and sequence.row in slab.used:
            for buffer in (buffer for buffers in slab.buffers for buffer in buffers):
                self.memory.write(buffer, sequence.row, 0, self._zeros(slab.capacity))  # NaN would pass any mask
        slab.used.add(sequence.row)
        return sequence

    def _zeros(self, tokens: int) -> np.ndarray:
        return np.zeros((self.kv_heads, tokens, self.head_size), np.float32)

    def _new_slab(self, capacity: int, rows: int) -> Slab:
        row_bytes, left = (capacity + self._spare) * self.token_bytes, self.budget_bytes - self.used_bytes
        rows = max(1, min(rows, self.budget_bytes // SLAB_SHARE // row_bytes, left // row_bytes))
        if row_bytes > left:
            raise OutOfMemoryError(
                f"{row_bytes / 2**20:.1f} MiB wanted for the KV of one sequence of {capacity} tokens, "
                f"{left / 2**20:.1f} of the device's {self.budget_bytes / 2**20:.1f} MiB are free. End a sequence or "
                f"give the KV more.")
        shape = (rows, self.kv_heads, capacity + self._spare, self.head_size)
        buffers = [(self.memory.zeros(shape), self.memory.zeros(shape)) for _ in range(self.layers)]
        self._numbers += 1
        slab = Slab(self._numbers, rows, capacity, rows * row_bytes, buffers, list(range(rows))[::-1])
        self._slabs.append(slab)
        return slab

    def _give_back(self, slab: Slab, row: int) -> None:
        del slab.tenants[row]
        slab.free.append(row)
        slab.free.sort(reverse=True)
        if len(slab.free) == slab.rows:
            self._slabs.remove(slab)

    def _move(self, sequence: DeviceSequence, target: DeviceSequence, tokens: int) -> None:
        self._copy(sequence, target, tokens)
        self._give_back(sequence.slab, sequence.row)
        sequence.slab, sequence.row = target.slab, target.row
        target.slab.tenants[target.row] = sequence

    def _copy(self, source: DeviceSequence, target: DeviceSequence, tokens: int) -> None:
        if tokens:
            for source_layer, target_layer in zip(source.slab.buffers, target.slab.buffers):
                for a, b in zip(source_layer, target_layer):
                    self.memory.copy(a, source.row, b, target.row, tokens)

    def _check(self, sequence: DeviceSequence, end: int = 0) -> None:
        if sequence.closed:
            raise ValueError("this sequence of the device's KV was closed")
        if end > sequence.capacity:
            raise ValueError(f"token {end} of a device sequence with room for {sequence.capacity}: grow it first")
