"""What a device does for hybrid execution: the parts of a step, its own KV, and a queue of its own.

`devices.base.Device` runs a whole step. An `Accelerator` hands out the pieces: segments cut at attention, attention
over KV that it holds, copies between its memory and the host's. Its KV budget is its own; the host's KV pages are not
seen here, so that a scheduler above decides who attends over what. One iteration over all layers:

    x = a.embed(token_ids)
    for layer in range(a.layers):
        x, qkv = a.segment(layer, x, attended, positions)          # attended: None before layer 0
        mine, theirs = a.take(qkv, 0, m), a.take(qkv, m, n)        # rows that attend here, rows that attend on the host
        host_rows = a.download(theirs)                             # float32 [n - m, (H + 2K) * D]; hand it to a thread
        attended = a.attend(layer, mine, parts)                    # KV on the device
        attended = a.join([attended, a.upload(host_result)])       # when the host is done, or an iteration later
    hidden, logits = a.head(x, attended, rows, logit_rows)

All of these are called on the accelerator's own thread: `submit` a function, it runs there in the order of submission
and its `Future` gives the value. The thread holds Python's lock only between calls, so that another thread runs Numba
kernels at the same time. On a device with `capabilities.asynchronous`, calls return before the work is done, and
`download` waits; on the others each call has finished when it returns.

A row is one token of one sequence. A row's results depend on its own sequence alone, up to rounding: products of one
row and of several may use different kernels (differences of the order of float32 rounding).

To add a device: fulfil this protocol, run tests/devices/conformance.py on it, name it in loading.py.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Capabilities:
    """name: as in LLM(device=...). provider, hardware: what runs it, in the words of its maker.

    host_memory: arrays lie in memory that the host shares; `upload`, `download`, `take` cost no copy.
    asynchronous: calls return before the work is done. whole: `whole` is there (one call for all layers).
    partial_attention: `attend_partial` is there. max_rows: of one call.
    """

    name: str
    provider: str
    hardware: str
    host_memory: bool
    asynchronous: bool
    whole: bool
    partial_attention: bool
    max_rows: int


@dataclass(frozen=True)
class AcceleratorMemory:
    """Bytes. weights: held by the device; kv_used: of its KV buffers, whole rows counted; kv_budget: what they may
    take; total: of the device's memory, None where it does not tell."""

    weights: int
    kv_used: int
    kv_budget: int
    total: int | None = None


@dataclass(frozen=True)
class DeviceCapacity:
    """A device's memory in bytes, None where it does not tell. shared: it is the host's memory."""

    shared: bool
    total: int | None = None
    free: int | None = None


@dataclass(frozen=True)
class Timing:
    """One call: kind ("segment", "attend", "head", "whole", "upload", "download"), layer (-1: none), rows, KV tokens
    attended over, seconds. On an asynchronous device seconds are those of submission, except for "download", unless
    `record(synchronize=True)`."""

    kind: str
    layer: int
    rows: int
    kv_tokens: int
    seconds: float


class Array(Protocol):
    """A float32 array [rows, width] in the device's memory. It lives as long as somebody holds it."""

    @property
    def rows(self) -> int: ...


class KVSequence(Protocol):
    """The KV of one sequence on the device, all layers. length: tokens held; capacity: tokens that fit without `grow`;
    order: sorting a batch by it makes the fewest calls."""

    length: int

    @property
    def capacity(self) -> int: ...

    @property
    def order(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class AttendPart:
    """`count` rows of one sequence (a `KVSequence` of this device), which follow the `sequence.length` tokens that it
    holds. `attend` leaves `length` as it is; the caller adds `count` when all layers are done."""

    sequence: Any
    count: int = 1


class DeviceKV(Protocol):
    """The device's KV buffers. They come in classes of capacity, half as much again from one to the next."""

    budget_bytes: int

    @property
    def used_bytes(self) -> int: ...

    def bytes_for(self, tokens: int) -> int:
        """Memory of one sequence with room for `tokens`."""

    def can_open(self, tokens: int, count: int = 1) -> bool:
        """Whether `count` more sequences of `tokens` fit the budget."""

    def open(self, tokens: int) -> Any:
        """An empty sequence with room for `tokens`. OutOfMemoryError: the budget does not hold it."""

    def grow(self, sequence: Any, tokens: int) -> None:
        """Room for `tokens` in all; what is there moves along. OutOfMemoryError leaves the sequence as it was."""

    def close(self, sequence: Any) -> None:
        """Give the memory back."""

    def read(self, sequence: Any, start: int, stop: int) -> np.ndarray:
        """Keys (after RoPE) and values of tokens start .. stop - 1, float32 [L, 2, K, stop - start, D], a copy on the
        host."""

    def write(self, sequence: Any, start: int, kv: np.ndarray, layers: range | None = None) -> None:
        """Store keys and values, laid out as `read` gives them, of all layers or of these; `length` becomes at least
        their end."""

    def copy(self, source: Any, target: Any, tokens: int) -> None:
        """The first `tokens` tokens of one sequence into another, on the device."""


class Accelerator(Protocol):
    """A loaded model whose steps can be taken apart. All methods but `submit`, `memory`, `drain` and `close` are called
    on the accelerator's thread. Errors: DeviceError (the device failed; the call had no effect on lengths, KV past
    `length` is undefined), OutOfMemoryError."""

    capabilities: Capabilities
    layers: int
    width: int
    vocab_size: int

    @property
    def kv(self) -> DeviceKV: ...

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the accelerator's thread after everything submitted before. EngineStoppedError when
        closed."""

    def embed(self, token_ids: np.ndarray) -> Any:
        """int [n] to the residual stream's first state [n, W]. TokenizerError: an id outside the vocabulary."""

    def segment(self, layer: int, x: Any, attended: Any | None, positions: np.ndarray) -> tuple[Any, Any]:
        """Segment `layer` of 0 to layers - 1 for n rows at int [n] positions: the residual stream [n, W] and qkv
        [n, (H + 2K) * D], queries and keys after QK norm and RoPE. attended [n, H * D]: the attention of layer - 1,
        None for layer 0."""

    def head(self, x: Any, attended: Any, rows: np.ndarray, logit_rows: np.ndarray,
             layers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """After `layers` layers (all of them unless told): final-norm states float32 [m, W] of the rows int [m], and
        logits float32 [j, V] of those of them that logit_rows int [j] names by their place in `rows`."""

    def attend(self, layer: int, qkv: Any, parts: Sequence[AttendPart]) -> Any:
        """Append the keys and values of qkv's rows to the device's KV and attend: [n, H * D]. parts name the rows in
        order. A sequence without room for its rows is a ValueError: `grow` it first."""

    def attend_partial(self, layer: int, queries: np.ndarray, sequence: Any) -> tuple[np.ndarray, np.ndarray]:
        """Queries float32 [n, H, D] over the `length` tokens that a sequence holds, nothing appended: output
        float32 [n, H, D] and log-sum-exp of the scores float32 [n, H], to be merged with those of other tokens."""

    def attend_over(self, queries: np.ndarray, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same over keys and values float32 [2, K, T, D] of the host's, T >= 1, which are copied over for it."""

    def whole(self, token_ids: np.ndarray, parts: Sequence[AttendPart], rows: np.ndarray,
              logit_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All layers for rows whose KV is on the device; result as `head`. Positions follow from the lengths."""

    def upload(self, array: np.ndarray) -> Any:
        """float32 [n, width] to the device. Do not change the array until the calls that read it have finished."""

    def download(self, array: Any) -> np.ndarray:
        """float32 [n, width] on the host; waits for what computes it."""

    def take(self, array: Any, start: int, stop: int) -> Any:
        """Rows start .. stop - 1."""

    def join(self, arrays: Sequence[Any]) -> Any:
        """Arrays below each other."""

    def memory(self) -> AcceleratorMemory: ...

    def record(self, on: bool = True, synchronize: bool = False) -> None:
        """Keep a `Timing` of every call from now on. synchronize: wait for each call, for true times on an asynchronous
        device (slower)."""

    def drain(self) -> list[Timing]:
        """The timings kept since the last call."""

    def close(self) -> None:
        """End the thread and give all memory back."""
