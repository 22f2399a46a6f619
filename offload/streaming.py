"""Rows whose KV is on the host and whose attention is on the device: pages are copied over layer by layer, ahead of
use. For links that are faster than the host's attention."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.offload.flow import Flow, merge
from edge_runtime.offload.host_rows import HostSlice
from edge_runtime.offload.page_values import read_pages

AHEAD = 2  # layers whose pages are read before the device comes to them


@dataclass(eq=False)
class StreamedFlow(Flow):
    """A flow of decoded rows; those of `rows.host` attend on the device. read: runs a function on a thread of the
    host's."""

    read: Callable[[Callable[[], Any]], Future[Any]] | None = None
    _pages: dict[int, Future[list[np.ndarray]]] = field(default_factory=dict)

    def hand_over(self, qkv: Any) -> None:
        a, rows, device = self.by.accelerator, self.rows, self.rows.on_device
        self._qkv = qkv
        for layer in range(self.layer, min(self.layer + AHEAD, a.layers)):
            self._prefetch(layer)
        if rows.host is not None:
            self._queries = a.download(a.take(qkv, device, rows.count))
        self._kept.append(a.download(a.take(qkv, 0, rows.count)))

    def attend(self) -> None:
        super().attend()
        if self.rows.host is None:
            return
        assert self._queries is not None
        c, host = self.by.config, self.rows.host
        q, k, v = np.split(self._queries, [c.q_width, c.q_width + c.kv_width], axis=1)
        q, k, v = (part.reshape(len(q), -1, c.head_size) for part in (q, k, v))
        output = np.empty((host.count, c.heads, c.head_size), np.float32)
        tokens = self._pages.pop(self.layer).result()
        with self.by.meter.device():
            for row, kv in enumerate(tokens):
                at = slice(row, row + 1)
                # The row's own token is not in its pages yet; its weight is 1 where it is alone.
                own_v, own_k = (np.repeat(part[at], c.group, axis=1) for part in (v, k))
                own_lse = (q[at] * own_k).sum(-1) * np.float32(c.head_size**-0.5)
                if not kv.shape[2]:
                    output[at] = own_v
                    continue
                seen, lse = self.by.accelerator.attend_over(q[at], kv)
                output[at] = merge(seen, lse, own_v, own_lse)[0]
        theirs = self.by.accelerator.upload(output.reshape(host.count, -1))
        self._mine = theirs if self._mine is None else self.by.accelerator.join([self._mine, theirs])

    def _prefetch(self, layer: int) -> None:
        host = self.rows.host
        if host is not None and layer not in self._pages:
            assert self.read is not None
            self._pages[layer] = self.read(lambda: [self._read(s, layer) for s in host.slices])

    def _read(self, s: HostSlice, layer: int) -> np.ndarray:
        """float32 [2, K, position, D]"""
        return read_pages(s.pages, self.by.host.layout, 0, s.position, range(layer, layer + 1))[0]
