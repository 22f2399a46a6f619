"""The same sequences, token by token, on a device alone and on a hybrid one: the logits must agree."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.devices.base import Step
from edge_runtime.devices.onnx import OnnxAccelerator, OnnxDevice
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.choices import Mode
from edge_runtime.offload.hybrid_device import HybridDevice
from tests.devices.conformance import Subject
from tests.offload.scripted import HOST, Place, Placed

TOKENS = 10  # decoded
LENGTHS = (1, 63, 64, 130, 200)  # of prompts: ends of pages among them
ERROR = 1e-3  # of logits whose spread is about 1, host pages in fp16 and the device's KV rounded to it
GAP = 2 * ERROR  # of the two best logits, below which another token may be the best
INT8_ERROR, INT8_GAP = 0.15, 0.3  # host pages in int8


class Generations:
    """Several sequences on a device, token by token, as the engine drives them. The tokens are given, so that every
    row's logits can be compared. lengths: of the prompts; tokens: decoded after each."""

    def __init__(self, device: Any, file: GGUFFile, lengths: Sequence[int] = LENGTHS, tokens: int = TOKENS):
        self.subject, self.lengths = Subject(device, file), lengths
        rng = np.random.default_rng(0)
        self.histories = [rng.integers(0, 260, n + tokens) for n in lengths]

    def logits(self) -> list[np.ndarray]:
        """[tokens + 1, V] of each sequence: after its prompt, and after each given token."""
        s = self.subject
        tables = [s.table() for _ in self.histories]
        found = [[s.run(s.slice(table, history[:n], logits="last")).logits[0]]
                 for table, history, n in zip(tables, self.histories, self.lengths)]
        pending = {i: s.slice(tables[i], self.histories[i][n:n + 1], prompt=False) for i, n in enumerate(self.lengths)}
        while pending:
            order = list(pending)
            result = s.device.run(Step(tuple(pending.values())))
            done = order if result.finished is None else [order[i] for i in result.finished]
            assert done
            for row, i in enumerate(done):
                found[i].append(result.logits[row].copy())
                at = tables[i].length
                if at == len(self.histories[i]):
                    del pending[i]
                else:
                    pending[i] = s.slice(tables[i], self.histories[i][at:at + 1], prompt=False)
        for table in tables:
            s.release(table)
        assert s.pool.used == 0
        return [np.stack(rows) for rows in found]


class Opened:
    """A hybrid device whose scheduler is changed from test to test, and what the device gives alone."""

    def __init__(self, path: Path, kv: str, provider: str = "cpu", *, lengths: Sequence[int] = LENGTHS,
                 tokens: int = TOKENS, **options: Any):
        self.file, self.lengths, self.tokens = GGUFFile(path), lengths, tokens
        config = config_from_gguf(self.file)
        options = {"kv_budget_bytes": 16 << 20, "half_kv": kv == "fp16", **options}
        alone = OnnxDevice(OnnxAccelerator(self.file, config, provider, **options), "segments")
        self.want = Generations(alone, self.file, lengths, tokens).logits()
        alone.close()
        self.device = HybridDevice(OnnxAccelerator(self.file, config, provider, **options), config,
                                   Placed(Mode.SYNCHRONOUS, lambda key, tokens: HOST), kv=kv)
        self.error, self.gap = (ERROR, GAP) if kv == "fp16" else (INT8_ERROR, INT8_GAP)

    def check(self, mode: Mode | Callable[[int], Mode], where: Callable[[int, int], Place]) -> Placed:
        """The same logits and tokens as alone."""
        apex = self.device.apex = Placed(mode, where)
        found = Generations(self.device, self.file, self.lengths, self.tokens).logits()
        compare(self.want, found, self.error, self.gap)
        assert self.device.accelerator.kv.used_bytes == 0
        return apex

    def close(self) -> None:
        self.device.close()
        self.file.close()


def compare(want: list[np.ndarray], found: list[np.ndarray], error: float, gap: float) -> None:
    for ours, theirs in zip(found, want):
        assert np.abs(ours - theirs).max() < error
        for row, other in zip(ours, theirs):
            best = np.sort(other)[-2:]
            assert row.argmax() == other.argmax() or best[1] - best[0] < gap
