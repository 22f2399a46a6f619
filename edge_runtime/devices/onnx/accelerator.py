"""A model on one of ONNX Runtime's providers, in parts: see `devices.accelerator.Accelerator`."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from edge_runtime.devices.accelerator import AcceleratorMemory, AttendPart, Capabilities, Timing
from edge_runtime.devices.onnx.arrays import Value
from edge_runtime.devices.onnx.attention import BasicAttention, OperatorAttention
from edge_runtime.devices.onnx.kv import DeviceKVPool
from edge_runtime.devices.onnx.memory import DeviceMemory, HostMemory, Memory
from edge_runtime.devices.onnx.providers import PROVIDERS
from edge_runtime.devices.onnx.sessions import Session, SessionSettings
from edge_runtime.devices.onnx.weights import GraphWeights
from edge_runtime.devices.worker import Worker
from edge_runtime.errors import DeviceError, InvalidRequestError, OutOfMemoryError, TokenizerError
from edge_runtime.models.config import ModelConfig, rope_factors, rope_inverse_frequencies
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.graph.decoder import DecoderGraphs
from edge_runtime.models.names import EMBEDDING
from edge_runtime.quant.dequantize import dequantize

T = TypeVar("T")
PRECISIONS = {"float32": 1, "int8": 4}  # MatMulNBits' accuracy_level
FORMS = ("segments", "whole")
ROW_STEPS = (1, 8, 32, 128, 512)  # rows that a provider with fixed shapes is compiled for


class OnnxAccelerator:
    """See `devices.accelerator.Accelerator`.

    provider: a name of `providers.PROVIDERS`. kv_budget_bytes: what KV may take of the device's memory. memory_budget:
    what weights and KV together may take, None: not checked. threads, cores: of the CPU provider; cores also pin the
    accelerator's own thread. precision: "float32" computes exactly what the file holds, "int8" rounds activations to 8
    bits where the provider has such products. forms: which sessions are made at once ("segments", "whole"); the other
    is made when it is first used, and holds its weights a second time (the sessions share nothing but the source).
    hardware: "CPU", "GPU" or "NPU" of a provider that has several. fixed_rows: compile for a few numbers of rows and
    fill up with zeros, as NPUs need. half_kv: keys and values are rounded to half precision (in float32 still), so that
    the host's fp16 pages hold the same numbers.

    Raises MissingExtraError, DeviceError, PlacementError (a node would run elsewhere), OutOfMemoryError,
    InvalidRequestError.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, provider: str = "cpu", *, kv_budget_bytes: int,
                 memory_budget: int | None = None, context: int | None = None, threads: int = 1,
                 cores: Sequence[int] = (), precision: str = "float32", forms: Sequence[str] = ("segments",),
                 max_rows: int = 512, hardware: str | None = None, fixed_rows: bool | None = None,
                 half_kv: bool = False):
        if provider not in PROVIDERS:
            raise InvalidRequestError("provider", provider, f"one of {', '.join(PROVIDERS)}")
        if precision not in PRECISIONS:
            raise InvalidRequestError("precision", precision, f"one of {', '.join(PRECISIONS)}")
        if kv_budget_bytes < 1:
            raise InvalidRequestError("kv_budget_bytes", kv_budget_bytes, "1 byte or more")
        self.config, self.layers, self.width, self.vocab_size = config, config.layers, config.width, config.vocab_size
        self._file, self._provider = file, PROVIDERS[provider]
        self._settings = SessionSettings(self._provider, max(1, threads), tuple(cores), hardware)
        self._graphs = DecoderGraphs(file, config, PRECISIONS[precision], half_kv, self._provider.half)
        self._weights_bytes = self._graphs.nbytes
        if memory_budget is not None and self._weights_bytes + kv_budget_bytes > memory_budget:
            raise OutOfMemoryError(
                f"{config.name} takes {self._weights_bytes / 2**20:.1f} MiB of weights and "
                f"{kv_budget_bytes / 2**20:.1f} MiB of KV on the device, the budget is {memory_budget / 2**20:.1f} "
                f"MiB. Use a smaller model, or give the KV less.")
        self._frequencies, self._rope_scale = rope_inverse_frequencies(config.rope, rope_factors(file, config))
        self._embedding = file.tensors[EMBEDDING]
        self._fixed = self._provider.fixed_shapes if fixed_rows is None else fixed_rows
        self._sessions: dict[tuple[str, int], Session] = {}
        self._last_angles: tuple[tuple, dict[str, np.ndarray]] = ((), {})
        self._timings: list[Timing] | None = None
        self._synchronize = False
        self._worker = Worker(f"edge-runtime-{provider}", tuple(cores))
        try:
            self._worker.submit(lambda: self._load(kv_budget_bytes, context or config.context_length, max_rows,
                                                   tuple(forms))).result()
        except BaseException:
            self.close()
            raise

    def _load(self, kv_budget_bytes: int, context: int, max_rows: int, forms: tuple[str, ...]) -> None:
        """On the accelerator's thread, which threads of sessions inherit their processors from."""
        provider, config = self._provider, self.config
        self._memory: Memory = HostMemory() if provider.memory == "cpu" else DeviceMemory(self._settings)
        self.kv = DeviceKVPool(self._memory, config.layers, config.kv_heads, config.head_size, kv_budget_bytes, context)
        self._weights = GraphWeights(self._graphs)
        attention = OperatorAttention if provider.operator_attention else BasicAttention
        self._attention = attention(self._graphs, self._settings, self._memory, self.kv, self._rows_of)
        self._basic = BasicAttention(self._graphs, self._settings, self._memory, self.kv, self._rows_of)
        rows, first = self._rows_of(1), None
        if "segments" in forms or not provider.operator_attention:
            for layer in range(config.layers):
                first = self._session("segment", layer, rows)
            self._session("head", config.layers, rows)
        if "whole" in forms and provider.operator_attention:
            first = self._session("whole", 0)
        self._attention.prepare()
        self._weights.release()
        self.capabilities = Capabilities(
            name=f"onnx:{provider.name}", provider=provider.ep, hardware=first.hardware if first else "",
            host_memory=self._memory.shared, asynchronous=provider.asynchronous, whole=provider.operator_attention,
            partial_attention=True, max_rows=max_rows)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        return self._worker.submit(function)

    def embed(self, token_ids: np.ndarray) -> Value:
        return self._memory.upload(self._embedded(token_ids))

    def segment(self, layer: int, x: Value, attended: Value | None, positions: np.ndarray) -> tuple[Value, Value]:
        rows = x.rows
        with self._timed("segment", layer, rows):
            padded = self._rows_of(rows)
            inputs: dict[str, Value | np.ndarray] = {"x": self._padded(x, padded), **self._angles(positions, padded)}
            outputs = {"qkv": (padded, self._graphs.qkv_width)}
            if layer:
                assert attended is not None
                inputs["attended"] = self._padded(attended, padded)
                outputs["x_out"] = (padded, self.width)
            new = self._session("segment", layer, padded).run(inputs, outputs)
            return (new["x_out"].first(rows) if layer else x), new["qkv"].first(rows)

    def head(self, x: Value, attended: Value, rows: np.ndarray, logit_rows: np.ndarray,
             layers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        layers = self.layers if layers is None else layers
        if not len(rows):
            return np.empty((0, self.width), np.float32), np.empty((0, self.vocab_size), np.float32)
        with self._timed("head", layers, len(rows)):
            return self._head(x, attended, np.asarray(rows), np.asarray(logit_rows), layers)

    def attend(self, layer: int, qkv: Value, parts: Sequence[AttendPart]) -> Value:
        _check_parts(parts, qkv.rows)
        with self._timed("attend", layer, qkv.rows, sum(p.sequence.length + p.count for p in parts)):
            return self._attention.attend(layer, qkv, parts)

    def attend_partial(self, layer: int, queries: np.ndarray, sequence) -> tuple[np.ndarray, np.ndarray]:
        with self._timed("attend", layer, len(queries), sequence.length):
            return self._basic.partial(layer, queries, sequence)

    def attend_over(self, queries: np.ndarray, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._timed("attend", -1, len(queries), kv.shape[2]):
            return self._basic.over(queries, kv)

    def whole(self, token_ids: np.ndarray, parts: Sequence[AttendPart], rows: np.ndarray,
              logit_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(self._attention, OperatorAttention):
            raise DeviceError(f'device="onnx:{self._provider.name}" has no whole-model graph: use segments')
        _check_parts(parts, len(token_ids))
        rows, logit_rows = np.asarray(rows, np.int64), np.asarray(logit_rows, np.int64)
        hidden = np.empty((len(rows), self.width), np.float32)
        logits = np.empty((len(logit_rows), self.vocab_size), np.float32)
        x = self._embedded(token_ids)
        with self._timed("whole", -1, len(token_ids), sum(p.sequence.length + p.count for p in parts)):
            session = self._session("whole", 0)
            for group in self._attention.groups(parts):
                place = {int(group.rows[r]): int(r) for r in group.real}
                mine = [i for i, row in enumerate(rows) if int(row) in place]
                chosen = [j for j, i in enumerate(logit_rows) if int(rows[i]) in place]
                wanted = np.array([place[int(rows[i])] for i in mine], np.int64)
                logit_places = np.array([mine.index(int(logit_rows[j])) for j in chosen], np.int64)
                inputs = {"x": x[group.rows], "rows": wanted, **self._angles(group.positions, len(group.rows)),
                          "shape": np.array([group.batch, group.count, self._graphs.qkv_width]),
                          "logit_rows": logit_places, **group.lengths}
                outputs: dict[str, Value | tuple[int, ...]] = {
                    "out.normed": (len(wanted), self.width), "logits": (len(chosen), self.vocab_size)}
                for layer in range(self.layers):
                    for part, buffer in zip(("key", "value"), group.buffers(layer)):
                        inputs[f"past_{part}.{layer}"] = outputs[f"present_{part}.{layer}"] = buffer
                new = session.run(inputs, outputs, to_host=("out.normed", "logits"))
                hidden[mine] = new["out.normed"]
                logits[chosen] = new["logits"]
        return hidden, logits

    def upload(self, array: np.ndarray) -> Value:
        with self._timed("upload", -1, len(array)):
            return self._memory.upload(array)

    def download(self, array: Value) -> np.ndarray:
        with self._timed("download", -1, array.rows):
            return self._memory.download(array)

    def take(self, array: Value, start: int, stop: int) -> Value:
        return self._memory.gather(array, np.arange(start, stop))

    def join(self, arrays: Sequence[Value]) -> Value:
        return self._memory.join([a for a in arrays if a.rows] or list(arrays)[:1])

    def memory(self) -> AcceleratorMemory:
        return AcceleratorMemory(self._weights_bytes, self.kv.used_bytes, self.kv.budget_bytes)

    def record(self, on: bool = True, synchronize: bool = False) -> None:
        self._timings, self._synchronize = ([] if on else None), synchronize

    def drain(self) -> list[Timing]:
        timings, self._timings = self._timings or [], None if self._timings is None else []
        return timings

    def close(self) -> None:
        self._worker.close()
        self._sessions.clear()
        for name in ("_attention", "_basic"):
            self.__dict__.pop(name, None)
        if hasattr(self, "kv"):
            self.kv.clear()
        if hasattr(self, "_weights"):
            self._weights.close()

    def _session(self, kind: str, index: int, rows: int = 0) -> Session:
        """rows: what it is compiled for, where shapes are fixed."""
        fixed = rows if self._fixed else 0
        key = (f"{kind}{index}", fixed)
        if key not in self._sessions:
            g = self._graphs
            model = g.whole() if kind == "whole" else g.head(index) if kind == "head" else g.segment(index)
            self._sessions[key] = Session(model, self._settings, self._weights.values,
                                          dict.fromkeys("nmj", fixed) if fixed else None)
        return self._sessions[key]

    def _head(self, x: Value, attended: Value, rows: np.ndarray, logit_rows: np.ndarray,
              layers: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(logit_rows)
        if self._fixed:  # the wanted rows alone, filled up; logits of all of them
            x, attended = (self._padded(self._memory.gather(a, rows), self._rows_of(len(rows))) for a in (x, attended))
            padded = x.rows
            wanted, logit_rows = np.arange(padded), np.concatenate([logit_rows, np.zeros(padded - count, np.int64)])
            session = self._session("head", layers, padded)
        else:
            wanted, session = rows, self._session("head", layers)
        new = session.run(
            {"x": x, "attended": attended, "rows": wanted, "logit_rows": logit_rows},
            {"out.normed": (len(wanted), self.width), "logits": (len(logit_rows), self.vocab_size)},
            to_host=("out.normed", "logits"))
        return new["out.normed"][:len(rows)], new["logits"][:count]

    def _embedded(self, token_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(token_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise TokenizerError(f"token id {bad}: this model's are 0 to {self.vocab_size - 1}")
        table = self._file.data(EMBEDDING).reshape(self.vocab_size, -1)
        return dequantize(table[ids], self._embedding.type, (len(ids), self.width))

    def _angles(self, positions: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        """The graphs' inputs of RoPE for `rows` rows, of which the last may have no position."""
        key = (np.asarray(positions).tobytes(), rows)
        if key == self._last_angles[0]:  # of the layer before
            return self._last_angles[1]
        angles = np.zeros((rows, len(self._frequencies)))
        angles[:len(positions)] = np.asarray(positions)[:, None] * self._frequencies.astype(np.float64)
        inputs: dict[str, np.ndarray] = {
            "cos": (np.cos(angles) * self._rope_scale).astype(np.float32),
            "sin": (np.sin(angles) * self._rope_scale).astype(np.float32), "places": np.arange(rows)[None]}
        self._last_angles = (key, inputs)
        return inputs

    def _rows_of(self, rows: int) -> int:
        """Rows that a call of `rows` is made with."""
        return next((step for step in ROW_STEPS if step >= rows), rows) if self._fixed else rows

    def _padded(self, x: Value, rows: int) -> Value:
        if x.rows == rows:
            return x
        return self._memory.join([x, self._memory.upload(np.zeros((rows - x.rows, x.shape[1]), np.float32))])

    @contextmanager
    def _timed(self, kind: str, layer: int, rows: int, kv_tokens: int = 0) -> Iterator[None]:
        if self._timings is None:
            yield
            return
        began = time.perf_counter()
        yield
        self._timings.append(Timing(kind, layer, rows, kv_tokens, time.perf_counter() - began))


def _check_parts(parts: Sequence[AttendPart], rows: int) -> None:
    if sum(part.count for part in parts) != rows:
        raise ValueError(f"{rows} rows, but parts of {sum(part.count for part in parts)}")
    for part in parts:
        if part.sequence.length + part.count > part.sequence.capacity:
            raise ValueError(f"a sequence of {part.sequence.length} tokens has room for {part.sequence.capacity}, not "
                             f"for {part.count} more: grow it first")
    if len({id(part.sequence) for part in parts}) != len(parts):
        raise ValueError("a sequence appears twice in one call")
