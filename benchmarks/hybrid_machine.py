"""Two processors out of one: ONNX Runtime's CPU provider with one thread on one core as the device, the host's
attention on another; and sequences whose KV was never computed, only put there."""
from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.devices.onnx import OnnxAccelerator
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.apex import Apex
from edge_runtime.offload.choices import Choice, Mode, Row
from edge_runtime.offload.cost_model import CostModel
from edge_runtime.offload.curves import Curves
from edge_runtime.offload.flow import Flow, Processors
from edge_runtime.offload.hybrid_device import HybridDevice
from edge_runtime.offload.overlap_meter import OverlapTimes
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.page_values import read_pages
from edge_runtime.offload.pages import PagePool
from edge_runtime.offload.profiler import measure

ROOM = 256  # tokens that laps may add to a sequence


@dataclass(frozen=True)
class Setting:
    """batch sequences of `tokens` KV tokens each; the device's KV holds `pool` of them."""

    batch: int
    tokens: int
    pool: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens // 1024}k, {self.pool} on the device"


@dataclass(frozen=True)
class Laps:
    """Decoding as it went: seconds in all, tokens, and per lap (mode, predicted, measured)."""

    seconds: float
    tokens: int
    pairs: tuple[tuple[Mode, float, float], ...]
    times: OverlapTimes

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Bench(HybridDevice):
    """The hybrid device, which can also do what it never does: wait for the host in every layer before the device's own
    attention begins."""

    serial = False

    def _flows(self, choice: Choice, by_key: dict[int, SequenceSlice]) -> list[Flow]:
        if not self.serial:
            return super()._flows(choice, by_key)
        device = [by_key[key] for key in choice.device if self._may_attend(by_key[key])]
        here = {s.key for s in device}
        flow = Flow(self._by, self._rows(device, [s for key, s in by_key.items() if key not in here]))
        _serial(self._by, flow)
        return [flow]


def _serial(by: Processors, flow: Flow) -> None:
    from edge_runtime.offload.flow import segment

    for _ in range(by.accelerator.layers):
        segment(by, [flow])
        if flow.in_flight is not None:
            flow.in_flight.result()
        flow.attend()
        flow.join()


class Fixed:
    """A scheduler that puts the first `device` rows on the device and the others on the host, always."""

    def __init__(self, mode: Mode, device: int, cost: CostModel):
        self.mode, self.device, self.cost = mode, device, cost

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice:
        keys = [row.key for row in rows if row.ready][:self.device]
        return Choice(self.mode, device=tuple(keys), host=tuple(row.key for row in rows if row.key not in keys))

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None:
        pass


class Recorded:
    """A scheduler whose laps are noted: (mode, predicted, measured) of each."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.cost = scheduler, scheduler.cost
        self.pairs: list[tuple[Mode, float, float]] = []

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice:
        choice: Choice = self.scheduler.choose(rows, pool_tokens)
        return choice

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None:
        self.pairs.append((choice.mode, choice.predicted, seconds))
        self.scheduler.measured(choice, seconds, tokens)


class Machine:
    """A model on the two processors. `kv`: of the host's pages."""

    def __init__(self, path: Path, *, kv: str = "int8", precision: str = "int8", context: int = 40960,
                 most_kv_bytes: int = 4 << 30):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        device, host = ((cores[0],), (cores[1],)) if len(cores) > 1 else ((), ())
        self.file = GGUFFile(path)
        self.config = config_from_gguf(self.file)
        self.accelerator = OnnxAccelerator(self.file, self.config, "cpu", kv_budget_bytes=most_kv_bytes, threads=1,
                                           cores=device, precision=precision, context=context)
        self.device = Bench(self.accelerator, self.config, Fixed(Mode.SYNCHRONOUS, 0, None), kv=kv,  # type: ignore[arg-type]
                            host_cores=host)
        self.pool = PagePool(self.device.kv_layout, 8 << 30)
        self.curves: Curves | None = None
        self._tables: list[PageTable] = []
        self._keys = 0

    def profile(self, seconds: float, say: Callable[[str], None]) -> Curves:
        found = measure(self.accelerator, self.device._host, self.config, seconds=seconds)
        say(f"profile: {found.seconds:.0f} s; {'; '.join(found.notes) or 'measured in full'}")
        self.curves = found.curves
        return found.curves

    @property
    def cost(self) -> CostModel:
        """A fresh one, that has learned nothing from laps yet."""
        assert self.curves is not None
        return CostModel(self.curves)

    def apex(self, cost: CostModel | None = None, force: Mode | None = None) -> Apex:
        """The product's scheduler."""
        kv = self.accelerator.kv
        token = kv.bytes_for(1024) // 1024
        return Apex(cost or self.cost, size=lambda tokens: kv.bytes_for(tokens) // token, force=force)

    @contextmanager
    def sequences(self, setting: Setting) -> Iterator[list[tuple[int, PageTable]]]:
        """Keys and tables of `setting`: random KV on the host, and copies of the first `pool` on the device, whose
        budget they fill."""
        kv = self.accelerator.kv
        kv.budget_bytes = max(1, setting.pool * kv.bytes_for(setting.tokens + ROOM))
        live: list[tuple[int, PageTable]] = []
        try:
            for i in range(setting.batch):
                self._keys += 1
                table = PageTable(self.pool)
                table.reserve(setting.tokens + ROOM)
                self._fill(table, setting.tokens)
                live.append((self._keys, table))
                if i < setting.pool:
                    self._copy(self._keys, table, setting.tokens)
            yield live
        finally:
            for key, table in live:
                self.device.forget(key)
                table.release()

    def _fill(self, table: PageTable, tokens: int) -> None:
        """One page of random KV, repeated: what it costs to read does not depend on the numbers."""
        first = self.pool.view(table.pages[0])
        if not hasattr(self, "_page"):
            rng = np.random.default_rng(0)
            from edge_runtime.offload.host_rows import HostRows, HostSlice

            width = self.config.q_width + 2 * self.config.kv_width
            qkv = [rng.standard_normal((64, width)).astype(np.float32) for _ in range(self.config.layers)]
            rows = HostRows(self.config, [HostSlice(table.addresses, 0, 64, prompt=True)])
            self.device._writer.store(range(self.config.layers), qkv, rows).result()
            self._page = first.copy()
        for page in table.pages:
            self.pool.view(page)[:] = self._page
        table.advance(tokens)

    def _copy(self, key: int, table: PageTable, tokens: int) -> None:
        def work() -> None:
            copies = self.device._copies
            if not copies.room(key, tokens + ROOM):
                raise MemoryError(f"no room for {tokens} tokens on the device")
            page = read_pages(table.addresses, self.device.kv_layout, 0, 64)
            for start in range(0, tokens, 64):
                self.accelerator.kv.write(copies[key], start, page[:, :, :, :min(64, tokens - start)])

        self.accelerator.submit(work).result()

    def laps(self, live: Sequence[tuple[int, PageTable]], tokens: int, scheduler: Any, *, count: int, warm: int = 1,
             serial: bool = False) -> Laps:
        """`count` laps of decoding from `tokens` KV tokens each on, after `warm` others; then all is as before."""
        device, position, recorded = self.device, {key: tokens for key, _ in live}, Recorded(scheduler)
        device.apex, device.serial = recorded, serial
        seconds, done = 0.0, 0

        def step() -> int:
            slices = tuple(SequenceSlice(np.array([7], np.int32), position[key], table.addresses, key=key,
                                         interactive=False) for key, table in live)
            result = device.run(Step(slices))
            finished = range(len(slices)) if result.finished is None else result.finished
            for i in finished:
                position[slices[i].key] += 1
            return len(finished)

        for _ in range(warm):
            step()
        recorded.pairs.clear()
        device.meter.start()
        for _ in range(count):
            began = time.perf_counter()
            done += step()
            seconds += time.perf_counter() - began
        times = device.meter.stop()
        device.serial = False
        device.apex = Fixed(Mode.SYNCHRONOUS, 0, scheduler.cost)  # cohorts under way come to their end
        step()
        return Laps(seconds, done, tuple(recorded.pairs), times)

    def bare(self, live: Sequence[tuple[int, PageTable]], tokens: int, count: int) -> float:
        """Seconds of a lap of the device alone, with nothing of the hybrid around it: median."""
        from edge_runtime.devices.accelerator import AttendPart

        a, copies = self.accelerator, self.device._copies

        def lap() -> float:
            parts = [AttendPart(copies[key]) for key, _ in live]
            for part in parts:
                part.sequence.length = tokens
            began = time.perf_counter()
            positions, rows = np.full(len(live), tokens), np.arange(len(live))
            x, qkv = a.segment(0, a.embed(np.full(len(live), 7)), None, positions)
            attended = a.attend(0, qkv, parts)
            for layer in range(1, a.layers):
                x, qkv = a.segment(layer, x, attended, positions)
                attended = a.attend(layer, qkv, parts)
            a.head(x, attended, rows, rows)
            return time.perf_counter() - began

        return statistics.median(a.submit(lap).result() for _ in range(count))

    def close(self) -> None:
        self.device.close()
        self.file.close()


