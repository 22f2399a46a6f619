"""Our CPU device under measurement, driven as the engine drives it: steps of slices over KV pages."""
from __future__ import annotations

import time
from typing import Any

import numpy as np

from edge_runtime import __version__
from edge_runtime.apps.bench_worker import STEP_TOKENS
from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.devices.cpu import CpuDevice
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.pages import PagePool, pages_for

KV_BUDGET = 1 << 40  # pages are taken one by one: the measurement needs no limit of its own


class OurRunner:
    """See `bench_worker.Runner`."""

    def load(self, path: str, threads: int, tokens: int, kv: str = "int8",
             extra_buffers: bool = True) -> dict[str, Any]:
        began = time.perf_counter()
        self.file = GGUFFile(path)
        config = config_from_gguf(self.file)
        self.device = CpuDevice.load(self.file, config, threads=threads, kv=kv, max_rows=STEP_TOKENS)
        self.pool = PagePool(self.device.kv_layout, KV_BUDGET)
        self.rng = np.random.default_rng(0)
        self.first_id = min(300, config.vocab_size // 2)
        self.sequences: list[list[int]] = [[]]
        self.filled = 0  # tokens whose KV sequence 0 holds
        return {"seconds": time.perf_counter() - began, "version": __version__, "threads": self.device.threads}

    def prefill(self, tokens: int) -> float:
        self._hold(1, tokens)
        began = time.perf_counter()
        self._fill(0, 0, tokens)
        self.filled = tokens
        return tokens / (time.perf_counter() - began)

    def decode(self, depth: int, tokens: int) -> float:
        self._hold(1, depth + tokens)
        if self.filled < depth:
            self._fill(0, self.filled, depth)
        self.filled = depth  # what is decoded now is written over next time
        return self._grow(1, depth, tokens)

    def batch(self, sequences: int, depth: int, tokens: int) -> float:
        self._hold(sequences, depth + tokens)
        for sequence in range(sequences):
            self._fill(sequence, 0, depth)
        rate = self._grow(sequences, depth, tokens)
        self._hold(1, 0)
        self.filled = 0
        return rate

    def logits(self, token_ids: list[int], out: str, as_prompt: bool = True) -> None:
        self._hold(1, len(token_ids))
        ids, rows = np.array(token_ids, np.int32), []
        if as_prompt:
            for first in range(0, len(ids), STEP_TOKENS):
                part = ids[first:first + STEP_TOKENS]
                rows.append(self._run([self._slice(0, first, part, "all", prompt=True)]).copy())
        else:
            for position in range(len(ids)):
                rows.append(self._run([self._slice(0, position, ids[position:position + 1], "last")]).copy())
        self.filled = 0
        np.save(out, np.concatenate(rows))

    def kv_bytes(self) -> int:
        return self.pool.stats().used_bytes

    def _hold(self, sequences: int, tokens: int) -> None:
        """Pages for `sequences` sequences of `tokens`; those of sequence 0 stay with what they hold."""
        while len(self.sequences) > sequences:
            for page in self.sequences.pop():
                self.pool.release(page)
        while len(self.sequences) < sequences:
            self.sequences.append([])
        for pages in self.sequences:
            missing = pages_for(tokens) - len(pages)
            if missing > 0:
                pages.extend(self.pool.alloc_many(missing))
        self.addresses = [self.pool.addresses(pages) for pages in self.sequences]

    def _ids(self, count: int) -> np.ndarray:
        return self.rng.integers(self.first_id, self.device.vocab_size, count, np.int32)

    def _slice(self, sequence: int, position: int, ids: np.ndarray, logits: str, prompt: bool = False) -> SequenceSlice:
        return SequenceSlice(ids, position, self.addresses[sequence], logits=logits, prompt=prompt)

    def _run(self, slices: list[SequenceSlice]) -> np.ndarray:
        return self.device.run(Step(tuple(slices))).logits

    def _fill(self, sequence: int, first: int, end: int) -> None:
        for at in range(first, end, STEP_TOKENS):
            last = min(end, at + STEP_TOKENS)
            self._run([self._slice(sequence, at, self._ids(last - at), "last" if last == end else "none", prompt=True)])

    def _grow(self, sequences: int, depth: int, tokens: int) -> float:
        began = time.perf_counter()
        for i in range(tokens):
            ids = self._ids(sequences)
            self._run([self._slice(s, depth + i, ids[s:s + 1], "last") for s in range(sequences)])
        return tokens * sequences / (time.perf_counter() - began)
