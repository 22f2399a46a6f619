"""Copies within a device's memory and across its border: NumPy where the host shares it, small graphs where not."""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from edge_runtime.devices.onnx.arrays import DeviceArray, HostArray, Value, host_arrays
from edge_runtime.devices.onnx.providers import runtime
from edge_runtime.devices.onnx.sessions import Session, SessionSettings, failures
from edge_runtime.models.graph.nodes import FLOAT, INT64, Graph, GraphModel


class Memory(Protocol):
    """float32 arrays of rows, and KV buffers [R, K, C, D] of which one row belongs to a sequence."""

    shared: bool

    def zeros(self, shape: tuple[int, ...]) -> Value: ...

    def upload(self, array: np.ndarray) -> Value: ...

    def download(self, array: Value) -> np.ndarray: ...

    def gather(self, array: Value, rows: np.ndarray) -> Value:
        """Rows int [m] of an array [n, w]."""

    def join(self, arrays: Sequence[Value]) -> Value: ...

    def read(self, buffer: Value, row: int, start: int, stop: int) -> np.ndarray:
        """A sequence's tokens start .. stop - 1, float32 [K, n, D], a copy on the host."""

    def write(self, buffer: Value, row: int, start: int, part: np.ndarray) -> None:
        """part [K, n, D] to tokens start .. start + n - 1."""

    def copy(self, source: Value, row: int, target: Value, target_row: int, tokens: int) -> None: ...


class HostMemory:
    """See `Memory`: the CPU's, or an accelerator's that works on the host's memory."""

    shared = True

    def zeros(self, shape: tuple[int, ...]) -> Value:
        return HostArray(np.zeros(shape, np.float32))

    def upload(self, array: np.ndarray) -> Value:
        return HostArray(np.ascontiguousarray(array, np.float32))

    def download(self, array: Value) -> np.ndarray:
        return _host(array)

    def gather(self, array: Value, rows: np.ndarray) -> Value:
        data, count = _host(array), len(rows)
        first = int(rows[0]) if count else 0
        if count and rows[-1] - first == count - 1 and (np.diff(rows) == 1).all():
            return array if count == len(data) else HostArray(data[first:first + count])
        return HostArray(data[rows])

    def join(self, arrays: Sequence[Value]) -> Value:
        return arrays[0] if len(arrays) == 1 else HostArray(np.concatenate(host_arrays(arrays)))

    def read(self, buffer: Value, row: int, start: int, stop: int) -> np.ndarray:
        return _host(buffer)[row, :, start:stop].copy()

    def write(self, buffer: Value, row: int, start: int, part: np.ndarray) -> None:
        _host(buffer)[row, :, start:start + part.shape[1]] = part

    def copy(self, source: Value, row: int, target: Value, target_row: int, tokens: int) -> None:
        _host(target)[target_row, :, :tokens] = _host(source)[row, :, :tokens]


class DeviceMemory:
    """See `Memory`: behind a provider; every copy is a session of one node there."""

    shared = False

    def __init__(self, settings: SessionSettings):
        self._settings = settings
        self._place = settings.provider.memory

    def zeros(self, shape: tuple[int, ...]) -> Value:
        if self._place != "webgpu":  # where new memory is zero by specification
            return self.upload(np.zeros(shape, np.float32))
        with failures(self._settings.provider, f"allocating {4 * int(np.prod(shape)) / 2**20:.1f} MiB"):
            value = runtime().OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self._place, 0)
            return DeviceArray(value, shape)

    def upload(self, array: np.ndarray) -> Value:
        array = np.ascontiguousarray(array, np.float32)
        with failures(self._settings.provider, f"copying {array.nbytes / 2**20:.1f} MiB to the device"):
            return DeviceArray(runtime().OrtValue.ortvalue_from_numpy(array, self._place, 0), array.shape)

    def download(self, array: Value) -> np.ndarray:
        assert isinstance(array, DeviceArray)
        with failures(self._settings.provider, "reading from the device"):
            return array.value.numpy().reshape(-1)[:int(np.prod(array.shape))].reshape(array.shape)

    def gather(self, array: Value, rows: np.ndarray) -> Value:
        if len(rows) and rows[0] == 0 and (np.diff(rows) == 1).all():
            return array.first(len(rows))
        return self._gather.run({"x": array, "rows": rows}, {"y": (len(rows), array.shape[1])})["y"]

    def join(self, arrays: Sequence[Value]) -> Value:
        joined = arrays[0]
        for array in arrays[1:]:
            joined = self._join.run({"a": joined, "b": array},
                                    {"y": (joined.rows + array.rows, array.shape[1])})["y"]
        return joined

    def read(self, buffer: Value, row: int, start: int, stop: int) -> np.ndarray:
        return self._cut(buffer, row, start, stop, ("y",))[0]

    def write(self, buffer: Value, row: int, start: int, part: np.ndarray) -> None:
        self._put(buffer, row, start, np.ascontiguousarray(part[None], np.float32))

    def copy(self, source: Value, row: int, target: Value, target_row: int, tokens: int) -> None:
        self._put(target, target_row, 0, self._cut(source, row, 0, tokens, ()))

    def _cut(self, buffer: Value, row: int, start: int, stop: int, to_host: tuple[str, ...]):
        kv_heads, head_size = buffer.shape[1], buffer.shape[3]
        return self._slice.run(
            {"cache": buffer, "starts": np.array([row, 0, start]), "ends": np.array([row + 1, kv_heads, stop])},
            {"y": (1, kv_heads, stop - start, head_size)}, to_host)["y"]

    def _put(self, buffer: Value, row: int, start: int, part) -> None:
        kv_heads, tokens = part.shape[1], part.shape[2]
        at = np.empty((1, kv_heads, tokens, 3), np.int64)
        at[..., 0], at[..., 1], at[..., 2] = row, np.arange(kv_heads)[:, None], np.arange(start, start + tokens)
        self._scatter.run({"cache": buffer, "at": at, "part": part}, {"y": buffer})

    @cached_property
    def _gather(self) -> Session:
        g = Graph("gather")
        g.op("Gather", [g.input("x", FLOAT, "n", "w"), g.input("rows", INT64, "m")], g.output("y", FLOAT, "m", "w"))
        return self._session(g.model())

    @cached_property
    def _join(self) -> Session:
        g = Graph("join")
        g.op("Concat", [g.input("a", FLOAT, "n", "w"), g.input("b", FLOAT, "m", "w")], g.output("y", FLOAT, "k", "w"),
             axis=0)
        return self._session(g.model())

    @cached_property
    def _slice(self) -> Session:
        g = Graph("slice")
        cache, axes = g.input("cache", FLOAT, "R", "K", "C", "D"), g.constant("axes", np.array([0, 1, 2]))
        g.op("Slice", [cache, g.input("starts", INT64, 3), g.input("ends", INT64, 3), axes],
             g.output("y", FLOAT, "r", "k", "n", "D"))
        return self._session(g.model())

    @cached_property
    def _scatter(self) -> Session:
        """Writes in place where input and output are the same buffer."""
        g = Graph("scatter")
        cache = g.input("cache", FLOAT, "R", "K", "C", "D")
        g.op("ScatterND", [cache, g.input("at", INT64, "r", "k", "n", 3), g.input("part", FLOAT, "r", "k", "n", "D")],
             g.output("y", FLOAT, "R", "K", "C", "D"))
        return self._session(g.model())

    def _session(self, model: GraphModel) -> Session:
        return Session(model, self._settings, {})


def _host(array: Value) -> np.ndarray:
    assert isinstance(array, HostArray)
    return array.array
