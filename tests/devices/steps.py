"""Drives a device the way the engine does: one sequence with its pages, prompts in chunks, tokens one by one."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.devices.cpu import CpuDevice
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import PagePool


class Driver:
    """A CPU device on a file, with a page pool."""

    def __init__(self, path: Path, **options):
        self.file = GGUFFile(path)
        self.config = config_from_gguf(self.file)
        self.device = CpuDevice(self.file, self.config, **options)
        self.pool = PagePool(self.device.kv_layout, 256 << 20)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()
        self.file.close()

    def table(self) -> PageTable:
        return PageTable(self.pool)

    def slice(self, table: PageTable, ids: np.ndarray, prompt: bool, logits: str = "all",
              hidden: bool = False) -> SequenceSlice:
        table.reserve(len(ids))
        position = table.length
        table.advance(len(ids))
        return SequenceSlice(np.asarray(ids, np.int32), position, table.addresses, logits, hidden, prompt)

    def run(self, *slices: SequenceSlice) -> np.ndarray:
        return self.device.run(Step(slices)).logits.copy()

    def prompt(self, ids: np.ndarray, cuts: tuple[int, ...] = ()) -> np.ndarray:
        """Logits [len(ids), V] of a prompt cut at `cuts`."""
        table, ends = self.table(), (*cuts, len(ids))
        starts = (0, *cuts)
        return np.concatenate([self.run(self.slice(table, ids[a:b], True)) for a, b in zip(starts, ends)])

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Logits [len(ids), V], a token at a time."""
        table = self.table()
        return np.concatenate([self.run(self.slice(table, ids[i:i + 1], False)) for i in range(len(ids))])


def divergence(want: np.ndarray, got: np.ndarray) -> float:
    """Mean KL divergence of next-token distributions, natural log."""
    log = lambda x: x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    p, q = log(want.astype(np.float64)), log(got.astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(-1).mean())
