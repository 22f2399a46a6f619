"""Measures `Curves` on this machine and model, within a time budget: each processor alone, then both at once."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np

from edge_runtime.devices.accelerator import Accelerator
from edge_runtime.errors import InvalidRequestError, OutOfMemoryError
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.curves import Curves, GridPoints
from edge_runtime.offload.device_meter import DeviceMeter
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.host_meter import HostMeter
from edge_runtime.offload.host_rows import HostRows
from edge_runtime.offload.page_values import read_pages
from edge_runtime.offload.plan import memory

T = TypeVar("T")
Progress = Callable[[str], None]

SECONDS = 48.0
LEAST_SECONDS = 0.5
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HEAD_ROWS = (1, 4, 16, 64)
SEQUENCES = (1, 4, 16, 64)
FILL_SHARE = 0.5  # of the time for a curve: to write the KV that is attended over
HELD = ((16, 2048, (1, 4, 16)), (1, 65536, (1,)), (64, 512, (64,)))  # on the device: sequences, tokens, rows at a time
TOKENS = (64, 512, 2048, 8192, 32768, 65536)  # KV of one row
PROMPT_ROWS = (16, 128, 512)
PROMPT_BEFORE = (0, 1024, 8192)
BYTES = (1 << 12, 1 << 15, 1 << 18, 1 << 21, 1 << 24, 1 << 26)
BRING_TOKENS = (64, 512, 2048)
MOST_TOKENS = 65536  # KV of all rows of a measurement together
MEMORY_SHARE = 4  # of what is free: as much as a measurement fills with KV, on either side
TOGETHER = 4, 4096  # rows and KV tokens of each, for the work of both processors at once
CALLS = 5  # of a place at least: one that is not counted, three that are, and what runs between them
ROUNDS = 3  # of alone and together in turns: the machine's own noise falls on both
ROUND_SECONDS = 0.25
SHARES = {"host pages": 6, "linear": 22, "head": 6, "device attention": 30, "host attention": 16, "device prompts": 12,
          "host prompts": 8, "copies": 4, "handover": 2, "contention": 8}  # of the time, in this order


@dataclass(frozen=True)
class Measurement:
    """curves; seconds that measuring took; notes: what was not measured as far as usual, and why."""

    curves: Curves
    seconds: float
    notes: tuple[str, ...]


def measure(accelerator: Accelerator, host: HostAttention, config: ModelConfig, *, seconds: float = SECONDS,
            progress: Progress | None = None, seed: int = 0) -> Measurement:
    """The curves of one model on `accelerator`, whose KV must be empty or nearly so, and `host`; both are left as they
    were. seconds: to measure for; filling memory and the first calls of large shapes may add a quarter.
    InvalidRequestError: a budget too small to measure anything. DeviceError, OutOfMemoryError as the device raises
    them."""
    if not seconds >= LEAST_SECONDS:
        raise InvalidRequestError("seconds", seconds, f"{LEAST_SECONDS} or more")
    return _Profiler(accelerator, host, config, seconds, progress or (lambda text: None), seed).run()


def reach(accelerator: Accelerator, config: ModelConfig) -> tuple[int, ...]:
    """How long the sequences may be that a measurement holds on the device, for each number of them: as far as budget,
    context and memory have room now. A profile that reaches less far was measured with less."""
    found = []
    for count, wanted, _ in HELD:
        tokens = min(wanted, config.context_length)
        while tokens >= TOKENS[0] and not _has_room(accelerator, tokens, count):
            tokens //= 2
        found.append(tokens if tokens >= TOKENS[0] else 0)
    return tuple(found)


def _has_room(accelerator: Accelerator, tokens: int, count: int) -> bool:
    kv = accelerator.kv
    try:
        budget = kv.can_open(tokens, count)
    except ValueError:  # longer than the device's longest sequence
        return False
    return budget and _fits_memory(accelerator, count * tokens)


def _fits_memory(accelerator: Accelerator, tokens: int) -> bool:
    """Of the host, where the device's KV lies in it; a device's own memory has its budget."""
    return (not accelerator.capabilities.host_memory
            or accelerator.kv.bytes_for(1) // 128 * tokens <= memory()[1] // MEMORY_SHARE)


class _Profiler:
    def __init__(self, accelerator: Accelerator, host: HostAttention, config: ModelConfig, seconds: float,
                 progress: Progress, seed: int):
        self.accelerator, self.host, self.config, self.layout = accelerator, host, config, host.layout
        self._progress, self._began, self._until = progress, time.perf_counter(), time.perf_counter() + seconds
        self._shares = dict(SHARES)
        self._notes: list[str] = []
        self.device = self._on_device(lambda: DeviceMeter(accelerator, config, seed))
        wanted = self._host_tokens()
        self.pages = HostMeter(host, config, host.layout, wanted, self._share("host pages") - time.perf_counter(), seed)
        if self.pages.tokens < MOST_TOKENS:
            why = "memory is short" if self.pages.tokens == wanted else "filling it would take too long"
            self._note("host attention", f"more than {self.pages.tokens:,} tokens", why)

    def run(self) -> Measurement:
        try:
            curves = self._curves()
        finally:
            self.pages.close()
        return Measurement(curves, time.perf_counter() - self._began, tuple(self._notes))

    def _curves(self) -> Curves:
        a, c, device = self.accelerator, self.config, self.device
        most = a.capabilities.max_rows
        rows = [n for n in ROWS if n <= most]
        linear = self._line("linear", rows, lambda n, s: self._on_device(lambda: device.linear(n, s)))
        head = self._line("head", [n for n in HEAD_ROWS if n <= most],
                          lambda n, s: self._on_device(lambda: device.head(n, s)))
        device_attention = self._device_attention()
        cells = [(n, tokens) for n in SEQUENCES for tokens in TOKENS
                 if tokens <= c.context_length and n * tokens <= self.pages.tokens]
        host_attention = self._grid("host attention", cells, self.pages.attention)
        device_prompt = self._device_prompt(most)
        prompts = [(n, before) for n in PROMPT_ROWS for before in PROMPT_BEFORE
                   if n <= most and n + before <= min(self.pages.tokens, c.context_length)]
        host_prompt = self._grid("host prompts", prompts, self.pages.prompt)
        upload, download, bring = self._copies()
        token_bytes = c.layers * 2 * c.kv_width * 4
        contention = self._contention()
        return Curves(
            layers=c.layers, linear=linear, head=head, device_attention=device_attention,
            host_attention=host_attention, device_prompt=device_prompt, host_prompt=host_prompt, upload=upload,
            download=download, handover=self._handover(), kv_bytes_device=token_bytes,
            kv_bytes_host=self.layout.page_bytes // 64, q_bytes=4 * (c.q_width + 2 * c.kv_width), o_bytes=4 * c.q_width,
            contention_device=contention[0], contention_host=contention[1], bring=bring)

    def _device_attention(self) -> GridPoints:
        """Sequences are filled once and used at several lengths and in several numbers."""
        found: dict[tuple[int, int], float] = {}
        until = self._share("device attention")
        for at, (count, wanted, numbers) in enumerate(HELD):
            now = time.perf_counter()
            end = now + max(until - now, 0.0) * (1.0 if at == len(HELD) - 1 else 0.5)
            wanted = min(wanted, self.config.context_length)
            with self._held("device attention", count, wanted, (end - now) * FILL_SHARE) as (sequences, most):
                places = [(n, tokens) for n in numbers for tokens in TOKENS
                          if tokens <= most and (n, tokens) not in found]
                grid = self._grid("device attention", places, partial(self._attend, sequences), end)
            found |= {(n, tokens): seconds for n, tokens, seconds in grid}
        if not found:
            raise OutOfMemoryError(f"the device's KV budget does not hold a sequence of {TOKENS[0]} tokens. Give it "
                                   f"more, or use the processor alone.")
        return tuple((n, tokens, seconds) for (n, tokens), seconds in found.items())

    def _attend(self, sequences: Sequence[Any], rows: int, tokens: int, seconds: float) -> float:
        return self._on_device(lambda: self.device.attention(sequences[:rows], tokens, seconds))

    def _device_prompt(self, most: int) -> GridPoints:
        rows, until = [n for n in PROMPT_ROWS if n <= most] or [most], self._share("device prompts")
        seconds = max(until - time.perf_counter(), 0.0) * FILL_SHARE
        wanted = min(rows[-1] + PROMPT_BEFORE[-1], self.config.context_length)
        with self._held("device prompts", 1, wanted, seconds) as (sequences, filled):
            places = [(n, before) for n in rows for before in PROMPT_BEFORE if n + before <= filled]
            if not places:
                raise OutOfMemoryError(f"the device's KV budget does not hold a prompt of {rows[0]} tokens. Give it "
                                       f"more, or use the processor alone.")
            return self._grid("device prompts", places, lambda n, b, s: self._on_device(
                lambda: self.device.prompt(sequences[0], n, b, s)), until)

    @contextmanager
    def _held(self, name: str, count: int, wanted: int, seconds: float) -> Iterator[tuple[list[Any], int]]:
        """Sequences on the device with KV of `wanted` tokens each, or as many as fit and as `seconds` suffice to fill;
        none, and 0, where 64 do not fit."""
        sequences: list[Any] = []
        tokens, filled = wanted, 0
        while tokens >= TOKENS[0] and not sequences:
            if _fits_memory(self.accelerator, count * tokens):
                sequences, filled = self._on_device(partial(self.device.open, tokens, count, seconds))
            if not sequences:
                tokens //= 2
        if filled < wanted:
            most = f"more than {filled:,} tokens" if sequences else f"{wanted:,} tokens"
            why = "writing the device's KV takes too long" if filled < tokens else "there is no room for it"
            self._note(name, f"{count} x {most}", why)
        try:
            yield sequences, filled
        finally:
            self._on_device(lambda: self.device.close(sequences))

    def _copies(self) -> tuple[Any, Any, Any]:
        sizes = [n for n in BYTES if n <= memory()[1] // 8]
        end = self._share("copies")
        third = (end - time.perf_counter()) / 3
        upload = self._line("upload", sizes, lambda n, s: self._on_device(lambda: self.device.upload(n, s)),
                            time.perf_counter() + third)
        download = self._line("download", sizes, lambda n, s: self._on_device(lambda: self.device.download(n, s)),
                              time.perf_counter() + third)
        tokens = [n for n in BRING_TOKENS if n <= len(self.pages.whole) * 64]
        return upload, download, self._line("bring", tokens, self._bring, end)

    def _bring(self, tokens: int, seconds: float) -> float:
        """Of all layers, told per layer."""
        kv = self.accelerator.kv
        sequences, _ = self._on_device(lambda: self.device.open(tokens, 1, 0.0))
        if not sequences:
            return self._on_device(lambda: self.device.upload(tokens * 8 * self.config.kv_width, seconds))

        def once() -> float:
            began = time.perf_counter()
            kv.write(sequences[0], 0, read_pages(self.pages.whole, self.layout, 0, tokens))
            kv.read(sequences[0], tokens - 1, tokens)  # waits, where calls return before the work is done
            return time.perf_counter() - began

        try:
            found, until = [self._on_device(once)], time.perf_counter() + seconds
            while len(found) < 2 or (len(found) < 8 and time.perf_counter() < until):
                found.append(self._on_device(once))
        finally:
            self._on_device(lambda: self.device.close(sequences))
        return median(found[1:]) / self.config.layers

    def _handover(self) -> float:
        """A layer's way of one row to the host's thread and back, without its attention and the copies of its bytes."""
        a, rows = self.accelerator, self.pages.decode(1, 1)
        found: list[float] = []
        until = self._share("handover")
        width = self.config.q_width + 2 * self.config.kv_width

        def once(qkv: Any, other: Any) -> float:
            began = time.perf_counter()
            theirs = a.download(a.take(qkv, 0, 1))
            copied = time.perf_counter()
            attended = self.host.submit(0, theirs, rows).result()
            back = time.perf_counter()
            joined = a.join([other, a.upload(attended.output)])
            if not a.capabilities.asynchronous:
                return time.perf_counter() - began - attended.seconds
            del joined
            return back - copied - attended.seconds

        qkv, other = self._on_device(lambda: (a.upload(np.zeros((2, width), np.float32)),
                                              a.upload(np.zeros((1, self.config.q_width), np.float32))))
        while len(found) < 8 or (len(found) < 200 and time.perf_counter() < until):
            found.append(self._on_device(lambda: once(qkv, other)))
        return max(0.0, median(found[1:]))

    def _contention(self) -> tuple[float, float]:
        """How much longer each takes while the other works, on decoding rows: weights, KV and all."""
        until, (count, wanted) = self._share("contention"), TOGETHER
        slower: list[tuple[float, float]] = []
        seconds = max(until - time.perf_counter(), 0.0) * FILL_SHARE
        with self._held("contention", count, min(wanted, self.pages.tokens // count, self.config.context_length),
                        seconds) as (held, tokens):
            if not held:
                return 1.0, 1.0
            rows = self.pages.decode(count, tokens)
            qkv = self.pages.qkv(rows)
            while len(slower) < ROUNDS or (len(slower) < 3 * ROUNDS and time.perf_counter() < until):
                each = min(max(0.02, (until - time.perf_counter()) / ROUNDS / 3), ROUND_SECONDS)
                device = self._on_device(partial(self.device.layers, held, tokens, each))
                host = self._feed(rows, qkv, time.perf_counter() + each)
                both = self.accelerator.submit(partial(self.device.layers, held, tokens, each))
                beside = self._feed(rows, qkv, None, both)
                slower.append((_low(both.result()) / _low(device), _low(beside) / _low(host)))
        return max(1.0, median(s[0] for s in slower)), max(1.0, median(s[1] for s in slower))

    def _feed(self, rows: HostRows, qkv: np.ndarray, until: float | None, beside: Future | None = None) -> list[float]:
        """The host's times, kept busy until a time or while `beside` runs."""
        found: list[float] = []
        while len(found) < 3 or (time.perf_counter() < until if until else beside is not None and not beside.done()):
            found.append(self.pages.run(rows, qkv).seconds)
        return found

    def _line(self, name: str, places: Sequence[int], once: Callable[[int, float], float],
              until: float | None = None) -> tuple[tuple[int, float], ...]:
        found = self._grid(name, [(place, 0) for place in places], lambda n, _, s: once(n, s), until,
                           lambda place, _: place)
        return tuple((place, seconds) for place, _, seconds in found)

    def _grid(self, name: str, places: Sequence[tuple[int, int]], once: Callable[[int, int, float], float],
              until: float | None = None,
              work: Callable[[int, int], float] = lambda rows, tokens: rows * (rows + tokens),
              ) -> tuple[tuple[int, int, float], ...]:
        """Measures places until the time is up: at least the first two, so that there is a line to go on with, and the
        first of each number of rows. Places that would take longer than what is left are passed over, and noted. work:
        what the time grows with, at most."""
        until = self._share(name) if until is None else until
        found: list[tuple[int, int, float]] = []
        skipped: list[str] = []
        firsts = {x: (x, y) for x, y in reversed(places)}
        least = sorted({*places[:2], *(firsts.values() if len(firsts) < len(places) else ())})
        for at, (x, y) in enumerate([*least, *(place for place in places if place not in least)]):
            left, place = until - time.perf_counter(), _place(name, x, y)
            if at >= len(least):
                last = found[-1]
                expected = CALLS * last[2] * work(x, y) / work(last[0], last[1])
                if expected > left:
                    skipped.append(place)
                    continue
            self._progress(f"{name}: {place}")
            found.append((x, y, once(x, y, max(left, 0.0) / (len(places) - at))))
        if skipped:
            more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
            self._note(name, skipped[0] + more, "the time was up")
        return tuple(sorted(found))

    def _share(self, name: str) -> float:
        """Until when: its share of the time that is left to it and what comes after it."""
        now, share = time.perf_counter(), self._shares.pop(name, 0)
        return now + max(0.0, self._until - now) * share / (share + sum(self._shares.values()) or 1)

    def _note(self, name: str, what: str, why: str) -> None:
        self._notes.append(f"{name}, {what}: extrapolated, {why}")

    def _host_tokens(self) -> int:
        tokens = MOST_TOKENS
        while tokens > 1024 and tokens // 64 * self.layout.page_bytes > memory()[1] // MEMORY_SHARE:
            tokens //= 2
        return tokens

    def _on_device(self, call: Callable[[], T]) -> T:
        return self.accelerator.submit(call).result()


def _low(seconds: Sequence[float]) -> float:
    """The lower quartile: other programs on this machine are seen in the upper ones."""
    return float(np.quantile(seconds, 0.25))


def _place(name: str, x: int, y: int) -> str:
    if name in ("upload", "download"):
        return f"{x:,} bytes"
    if name == "bring":
        return f"{x:,} tokens"
    before = " before" if "prompts" in name else ""
    return f"{x:,} rows" + (f", {y:,} tokens{before}" if y or before else "")
