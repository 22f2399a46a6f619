"""Attention over the device's KV: GroupQueryAttention on slabs, or basic operators one sequence at a time."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_runtime.devices.accelerator import AttendPart
from edge_runtime.devices.onnx.arrays import HostArray, Value
from edge_runtime.devices.onnx.kv import DeviceKVPool, DeviceSequence, Slab
from edge_runtime.devices.onnx.memory import Memory
from edge_runtime.devices.onnx.sessions import Session, SessionSettings
from edge_runtime.errors import DeviceError
from edge_runtime.models.graph.decoder import DecoderGraphs

CHUNKS = (64, 16)  # tokens of a prompt in one call that the check tries
CHECK_CAPACITY = 128
ROW_BLOCKS = (128, 64)  # tokens whose values are multiplied at a time: 32 KiB with D = 64, in the first cache level
_CHECKED: dict[tuple, int] = {}  # what the check found, by provider, hardware and shape
CHECK_ERROR = 1e-3  # float32 rounding gives 1e-6
MASKED = np.float32(-1e30)  # added to a score: its weight is 0, and no infinity minus infinity arises


@dataclass(frozen=True)
class Group:
    """One call: `batch` neighbouring rows of a slab from `first` on, `count` tokens of each. rows: int [batch * count],
    places in the caller's rows, in the order of the call. real: int, which of these are the caller's (others are of
    rows that have no part)."""

    slab: Slab
    first: int
    batch: int
    count: int
    rows: np.ndarray
    real: np.ndarray
    positions: np.ndarray
    lengths: dict[str, np.ndarray]

    def buffers(self, layer: int) -> list[Value]:
        """Keys and values [batch, K, C, D] of a layer."""
        return [_rows_of(buffer, self.first, self.batch) for buffer in self.slab.buffers[layer]]


class OperatorAttention:
    """GroupQueryAttention. Decoded tokens of neighbouring rows go together, each chunk of a prompt by itself."""

    def __init__(self, graphs: DecoderGraphs, settings: SessionSettings, memory: Memory, kv: DeviceKVPool,
                 rows_of: Callable[[int], int]):
        self._graphs, self._settings, self._memory, self._kv = graphs, settings, memory, kv
        self._most = max(CHUNKS)  # tokens of a prompt in one call
        self._last: tuple[tuple, list[Group]] = ((), [])

    def prepare(self) -> None:
        """Find out, on random numbers, what the provider computes right: it may lack the operator, or have a kernel
        that is wrong here (WebGPU's for 32 rows and more is, on software Vulkan). DeviceError: nothing is right."""
        c, rng = self._graphs.config, np.random.default_rng(0)
        key = (self._settings.provider.name, self._settings.hardware, c.heads, c.kv_heads, c.head_size)
        if key in _CHECKED:
            self._most = _CHECKED[key]
            return
        shape = (1, c.kv_heads, CHECK_CAPACITY, c.head_size)
        wrong = 1.0
        for chunk in CHUNKS:
            data = rng.standard_normal((max(CHUNKS) + 2, self._graphs.qkv_width)).astype(np.float32)
            buffers = self._memory.zeros(shape), self._memory.zeros(shape)
            slab = Slab(0, 1, CHECK_CAPACITY, 0, [buffers])
            sequence, out = DeviceSequence(slab, 0), []
            for first in (*range(0, len(data) - 2, chunk), len(data) - 2, len(data) - 1):
                count = min(chunk, len(data) - 2 - first) if first < len(data) - 2 else 1
                group = self._chunk(sequence, first, count)
                out.append(self._memory.download(self._run(0, group, self._memory.upload(data[group.rows]))))
                sequence.length += count
            wrong = float(np.abs(np.concatenate(out) - attention_oracle(data, c.heads, c.kv_heads, c.head_size)).max())
            if wrong < CHECK_ERROR:
                _CHECKED[key] = self._most = chunk if chunk < max(CHUNKS) else 1 << 30
                return
        raise DeviceError(f'device="onnx:{self._settings.provider.name}" computes attention wrongly (by {wrong:.2g} on '
                          f"unit normal values). Update its driver, or use device=\"cpu\".")

    @cached_property
    def _session(self) -> Session:
        return Session(self._graphs.attention(), self._settings, {})

    def attend(self, layer: int, qkv: Value, parts: Sequence[AttendPart]) -> Value:
        groups = self.groups(parts)
        outputs, places = [], []
        for group in groups:
            mine = self._memory.gather(qkv, group.rows)
            outputs.append(self._run(layer, group, mine))
            places.append(group.rows[group.real])
        out = self._memory.join(outputs)
        order = np.concatenate(places)
        return out if (order == np.arange(len(order))).all() else self._memory.gather(out, np.argsort(order))

    def groups(self, parts: Sequence[AttendPart]) -> list[Group]:
        """The calls for `parts`, in an order that keeps the caller's rows together where it can; the same for every
        layer of an iteration, so the last answer is kept."""
        if self._last[0] != self._key(parts):
            groups = self._groups(parts)  # may move sequences
            self._last = (self._key(parts), groups)
        return self._last[1]

    def _key(self, parts: Sequence[AttendPart]) -> tuple:
        """All that the calls depend on: places and lengths of the parts, and of rows without a part beside them."""
        key = tuple((*part.sequence.order, part.sequence.length, part.count) for part in parts)
        if self._memory.shared:
            return key
        slabs = {part.sequence.slab.number: part.sequence.slab for part in parts}
        return key, tuple((row, t.length) for slab in slabs.values() for row, t in sorted(slab.tenants.items()))

    def _groups(self, parts: Sequence[AttendPart]) -> list[Group]:
        firsts = np.cumsum([0, *(part.count for part in parts)])
        decoded = [(part.sequence, int(first)) for part, first in zip(parts, firsts) if part.count == 1]
        self._kv.together([sequence for sequence, _ in decoded])
        groups = []
        for part, first in zip(parts, firsts):
            if part.count > 1:
                self._kv.alone(part.sequence, part.sequence.length + part.count)
                groups += self._chunks(part.sequence, int(first), part.count)
        decoded.sort(key=lambda pair: pair[0].order)
        at = 0
        while at < len(decoded):
            end = at + 1
            while end < len(decoded) and self._same_call(decoded[at][0], decoded[end - 1][0], decoded[end][0]):
                end += 1
            groups.append(self._decode(decoded[at:end]))
            at = end
        return sorted(groups, key=lambda group: int(group.rows[group.real][0]))

    def _same_call(self, first: DeviceSequence, before: DeviceSequence, sequence: DeviceSequence) -> bool:
        if sequence.slab is not first.slab:
            return False
        return not self._memory.shared or sequence.row == before.row + 1

    def _chunks(self, sequence: DeviceSequence, first: int, count: int) -> list[Group]:
        return [self._chunk(sequence, first + at, min(self._most, count - at), at)
                for at in range(0, count, self._most)]

    def _chunk(self, sequence: DeviceSequence, first: int, count: int, before: int = 0) -> Group:
        """before: tokens of the same call that come first."""
        start = sequence.length + before
        return Group(sequence.slab, sequence.row, 1, count, np.arange(first, first + count), np.arange(count),
                     np.arange(start, start + count), _lengths([start + count]))

    def _decode(self, members: list[tuple[DeviceSequence, int]]) -> Group:
        """On a device's own memory a call begins at the slab's first row: rows without a part repeat the first
        member's token and write behind their own end."""
        slab = members[0][0].slab
        by_row = {sequence.row: (sequence, row) for sequence, row in members}
        low = members[0][0].row if self._memory.shared else 0
        high = members[-1][0].row
        span = range(low, high + 1)
        rows: list[int] = []
        real: list[int] = []
        lengths: list[int] = []
        for slab_row, idle in zip(span, slab.idle_positions(span)):
            if slab_row in by_row:
                sequence, row = by_row[slab_row]
                real.append(len(rows))
                rows.append(row)
                lengths.append(sequence.length)
            else:
                rows.append(members[0][1])
                lengths.append(idle)
        positions = np.array(lengths)
        return Group(slab, low, len(rows), 1, np.array(rows), np.array(real), positions, _lengths(positions + 1))

    def _run(self, layer: int, group: Group, qkv: Value) -> Value:
        keys, values = group.buffers(layer)
        width = self._graphs.config.q_width
        new = self._session.run(
            {"qkv": qkv.reshaped(group.batch, group.count, qkv.shape[-1]), "past_key": keys, "past_value": values,
             **group.lengths},
            {"attended": (group.batch, group.count, width), "present_key": keys, "present_value": values})
        out = new["attended"].reshaped(group.batch * group.count, width)
        return out if len(group.real) == len(group.rows) else self._memory.gather(out, group.real)


class BasicAttention:
    """Basic operators over a sequence's whole buffer with a mask; the host writes new keys and values into it first, so
    the memory must be shared with it (`partial`, which writes nothing, runs anywhere)."""

    def __init__(self, graphs: DecoderGraphs, settings: SessionSettings, memory: Memory, kv: DeviceKVPool,
                 rows_of: Callable[[int], int]):
        self._graphs, self._settings, self._memory, self._kv = graphs, settings, memory, kv
        self._rows_of = rows_of
        self._sessions: dict[tuple[int, int], Session] = {}
        self._row_sessions: dict[int, Session] = {}

    def prepare(self) -> None:
        self._session(self._rows_of(1), self._kv.class_of(1))

    def attend(self, layer: int, qkv: Value, parts: Sequence[AttendPart]) -> Value:
        assert isinstance(qkv, HostArray)
        c, data = self._graphs.config, qkv.array
        q, k, v = np.split(data, [c.q_width, c.q_width + c.kv_width], axis=1)
        out, first = np.empty((len(data), c.q_width), np.float32), 0
        for part in parts:
            rows, start = slice(first, first + part.count), part.sequence.length
            end = start + part.count
            for buffer, new in zip(part.sequence.slab.buffers[layer], (k[rows], v[rows])):
                by_head = new.reshape(part.count, c.kv_heads, c.head_size).transpose(1, 0, 2)
                self._memory.write(buffer, part.sequence.row, start, by_head)
            out[rows] = self._attend(layer, q[rows], part.sequence, np.arange(start, end))[0]
            first += part.count
        return HostArray(out)

    def partial(self, layer: int, queries: np.ndarray, sequence: DeviceSequence) -> tuple[np.ndarray, np.ndarray]:
        n, c = len(queries), self._graphs.config
        if not sequence.length:
            return np.zeros((n, c.heads, c.head_size), np.float32), np.full((n, c.heads), -np.inf, np.float32)
        if n == 1 and self._streams:
            keys, values = (_host_rows(buffer, sequence.row) for buffer in sequence.slab.buffers[layer])
            return self._one_row(queries, keys, values, sequence.length)
        self._kv.alone(sequence, sequence.length)
        flat = np.ascontiguousarray(queries, np.float32).reshape(n, c.q_width)
        out, lse = self._attend(layer, flat, sequence, np.full(n, sequence.length - 1))
        return out.reshape(n, c.heads, c.head_size), lse

    def over(self, queries: np.ndarray, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same over keys and values float32 [2, K, T, D] that come from the host."""
        n, c = len(queries), self._graphs.config
        if n == 1 and self._streams and kv.shape[2] % min(ROW_BLOCKS) == 0 and kv[0, 0].flags.c_contiguous:
            return self._one_row(queries, kv[0], kv[1], kv.shape[2])
        keys, values = (self._memory.upload(part[None]) for part in kv)
        rows, tokens = self._rows_of(n), kv.shape[2]
        padded = np.zeros((rows, c.q_width), np.float32)
        padded[:n] = queries.reshape(n, c.q_width)
        new = self._session(rows, tokens).run(
            {"queries": padded, "key": keys, "value": values, "mask": np.zeros((rows * c.group, tokens), np.float32)},
            {"attended": (rows, c.q_width), "lse": (rows, c.heads)}, to_host=("attended", "lse"))
        return new["attended"][:n].reshape(n, c.heads, c.head_size), new["lse"][:n]

    @cached_property
    def _streams(self) -> bool:
        """Where `attention_of_one_row` is faster, and heads of the KV can be given apart."""
        return self._settings.provider.name == "cpu" and self._memory.shared

    def _row_session(self, block: int) -> Session:
        if block not in self._row_sessions:
            self._row_sessions[block] = Session(self._graphs.attention_of_one_row(block), self._settings, {})
        return self._row_sessions[block]

    def _one_row(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray,
                 tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """keys, values float32 [K, C, D], contiguous in each head, C a multiple of 64: what is not held is not read,
        to the next whole block."""
        block = next(size for size in ROW_BLOCKS if -(-tokens // size) * size <= keys.shape[1])
        end = -(-tokens // block) * block
        c = self._graphs.config
        mask = np.zeros(end, np.float32)
        mask[tokens:] = MASKED
        inputs: dict[str, Value | np.ndarray] = {"queries": queries.reshape(1, c.q_width), "mask": mask}
        for i in range(c.kv_heads):
            inputs[f"key.{i}"] = HostArray(keys[i, :end])
            inputs[f"value.{i}"] = HostArray(values[i, :end].reshape(-1, 1, block, c.head_size))
        new = self._row_session(block).run(inputs, {"attended": (1, c.q_width), "lse": (1, c.heads)},
                                    to_host=("attended", "lse"))
        return new["attended"].reshape(1, c.heads, c.head_size), new["lse"]

    def _attend(self, layer: int, queries: np.ndarray, sequence: DeviceSequence,
                last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query i attends over the sequence's tokens 0 .. last[i]."""
        c = self._graphs.config
        keys, values = (_rows_of(buffer, sequence.row, 1) for buffer in sequence.slab.buffers[layer])
        rows, capacity = self._rows_of(len(queries)), keys.shape[2]
        mask = np.zeros((rows, capacity), np.float32)
        mask[:len(last)] = np.where(np.arange(capacity) > last[:, None], MASKED, np.float32(0))
        padded = np.zeros((rows, c.q_width), np.float32)
        padded[:len(queries)] = queries
        new = self._session(rows, capacity).run(
            {"queries": padded, "key": keys, "value": values, "mask": np.repeat(mask, c.group, axis=0)},
            {"attended": (rows, c.q_width), "lse": (rows, c.heads)}, to_host=("attended", "lse"))
        return new["attended"][:len(queries)], new["lse"][:len(queries)]

    def _session(self, rows: int, capacity: int) -> Session:
        fixed = self._rows_of(1) != 1 or self._rows_of(2) != 2
        key = (rows, capacity) if fixed else (0, 0)
        if key not in self._sessions:
            sizes = {"n": rows, "n*G": rows * self._graphs.config.group, "C": capacity} if fixed else None
            self._sessions[key] = Session(self._graphs.attention_of_basics(), self._settings, {}, sizes)
        return self._sessions[key]


def attention_oracle(qkv: np.ndarray, heads: int, kv_heads: int, head_size: int) -> np.ndarray:
    """Causal attention of one sequence in NumPy: qkv float32 [T, (H + 2K) * D] to [T, H * D]."""
    cuts = [heads * head_size, (heads + kv_heads) * head_size]
    q, k, v = (part.reshape(len(qkv), -1, head_size).transpose(1, 0, 2) for part in np.split(qkv, cuts, axis=1))
    k, v = (np.repeat(part, heads // kv_heads, axis=0) for part in (k, v))
    scores = q @ k.transpose(0, 2, 1) * np.float32(head_size**-0.5)
    scores = np.where(np.tri(len(qkv), dtype=bool), scores, MASKED)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    return np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(len(qkv), -1)


def _lengths(ends: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    ends = np.asarray(ends, np.int32)
    return {"seqlens": ends - 1, "total": ends.max(keepdims=True)}


def _host_rows(buffer: Value, row: int) -> np.ndarray:
    """A row of a KV buffer in the host's memory, [K, C, D]."""
    assert isinstance(buffer, HostArray)
    return buffer.array[row]


def _rows_of(buffer: Value, first: int, count: int) -> Value:
    """Rows first .. first + count - 1 of a KV buffer; from 0 on where only the device can point into it."""
    if isinstance(buffer, HostArray):
        return HostArray(buffer.array[first:first + count])
    assert first == 0
    return buffer.first(count)
