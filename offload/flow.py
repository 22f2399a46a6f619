"""A batch of rows on its way through the layers: linear parts on the device, attention where each row's KV is."""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.devices.accelerator import Accelerator, AttendPart
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.host_attention import Attended, HostAttention
from edge_runtime.offload.host_rows import HostRows
from edge_runtime.offload.overlap_meter import OverlapMeter


@dataclass(frozen=True)
class Processors:
    """Who does the work. writer: stores keys and values of rows that attend on the device into the host's pages; a
    thread apart, so that it does not wait behind the attention of others."""

    accelerator: Accelerator
    host: HostAttention
    writer: HostAttention
    config: ModelConfig
    meter: OverlapMeter


@dataclass(frozen=True)
class Rows:
    """Rows of a step in their order in the batch: `parts`, which attend on the device, then those of `host`.

    keys, counts: the sequence of each slice, and its rows. ids, positions: int [n]. stored: the device's rows, to be
    written into the host's pages too. partial: (first of the host's rows, how many, sequence on the device) of those
    whose skipped tokens the device attends over.
    """

    keys: tuple[int, ...]
    counts: tuple[int, ...]
    ids: np.ndarray
    positions: np.ndarray
    parts: tuple[AttendPart, ...] = ()
    stored: HostRows | None = None
    host: HostRows | None = None
    partial: tuple[tuple[int, int, Any], ...] = ()

    @property
    def on_device(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def count(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Flow:
    """`layer` segments are done; the attention of the last one is under way from `hand_over` until `join`."""

    by: Processors
    rows: Rows
    layer: int = 0
    x: Any = None
    attended: Any = None
    writing: list[Future[None]] = field(default_factory=list)
    _qkv: Any = None
    _mine: Any = None
    _theirs: Future[Attended] | None = None
    _queries: np.ndarray | None = None
    _split: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    _kept: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.x = self.by.accelerator.embed(self.rows.ids)

    @property
    def ready(self) -> bool:
        """Whether `join` would not wait."""
        return self._theirs is None or self._theirs.done()

    @property
    def in_flight(self) -> Future[Attended] | None:
        return self._theirs

    def hand_over(self, qkv: Any) -> None:
        """The segment gave qkv: the host begins with its rows."""
        a, rows, device = self.by.accelerator, self.rows, self.rows.on_device
        self._qkv = qkv
        if rows.host is not None:
            theirs = a.download(a.take(qkv, device, rows.count))
            self._theirs = self.by.host.submit(self.layer, theirs, rows.host)
            self._queries = theirs
        if rows.stored is not None:
            self._kept.append(a.download(a.take(qkv, 0, device)))

    def attend(self) -> None:
        """The device's attention: its own rows, and the skipped tokens of the host's."""
        a, rows, device, c = self.by.accelerator, self.rows, self.rows.on_device, self.by.config
        if not device and not rows.partial:
            return
        with self.by.meter.device():
            if device:
                mine = self._qkv if device == rows.count else a.take(self._qkv, 0, device)
                self._mine = a.attend(self.layer, mine, rows.parts)
            for first, count, sequence in rows.partial:
                assert self._queries is not None
                queries = self._queries[first:first + count, :c.q_width].reshape(count, c.heads, c.head_size)
                output, lse = a.attend_partial(self.layer, queries, sequence)
                self._split.append((first, output, lse))

    def join(self) -> None:
        """Waits for the host; then all rows have attended in this layer."""
        a = self.by.accelerator
        if self._theirs is None:
            self.attended = self._mine
        else:
            found = self._theirs.result()
            self.by.meter.host(found.began, found.ended)
            output = self._merged(found)
            theirs = a.upload(output)
            self.attended = theirs if self._mine is None else a.join([self._mine, theirs])
        self._qkv = self._mine = self._theirs = None
        self._split.clear()
        self.layer += 1

    def store(self) -> None:
        """Begins to write the keys and values of the device's rows, of the layers since the last time, into the host's
        pages: `writing` says when it is done."""
        if self.rows.stored is not None and self._kept:
            kept, self._kept = self._kept, []
            layers = range(self.layer - len(kept), self.layer)
            self.writing.append(self.by.writer.store(layers, kept, self.rows.stored))

    def _merged(self, found: Attended) -> np.ndarray:
        c, output = self.by.config, found.output
        for first, device_output, device_lse in self._split:
            at = slice(first, first + len(device_output))
            assert found.lse is not None
            mine = output[at].reshape(-1, c.heads, c.head_size)
            output[at] = merge(mine, found.lse[at], device_output, device_lse)[0].reshape(len(mine), -1)
        return output


def segment(by: Processors, flows: Sequence[Flow]) -> None:
    """The next segment of flows that stand at the same layer, as one batch; each hands over its attention."""
    a, layer = by.accelerator, flows[0].layer
    with by.meter.device():
        if len(flows) == 1:
            flow = flows[0]
            flow.x, qkv = a.segment(layer, flow.x, flow.attended, flow.rows.positions)
            flow.hand_over(qkv)
            return
        x = a.join([flow.x for flow in flows])
        attended = a.join([flow.attended for flow in flows]) if layer else None
        x, qkv = a.segment(layer, x, attended, np.concatenate([flow.rows.positions for flow in flows]))
        first = 0
        for flow in flows:
            end = first + flow.rows.count
            flow.x = a.take(x, first, end)
            flow.hand_over(a.take(qkv, first, end))
            first = end


def merge(one: np.ndarray, one_lse: np.ndarray, two: np.ndarray, two_lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention over two disjoint sets of tokens as attention over both. Outputs float32 [n, H, D], log-sum-exp
    float32 [n, H]."""
    top = np.maximum(one_lse, two_lse)
    a, b = np.exp(one_lse - top), np.exp(two_lse - top)
    total = a + b
    output = one * (a / total)[..., None] + two * (b / total)[..., None]
    return output.astype(np.float32, copy=False), top + np.log(total)
