"""Hybrid execution, measured: every figure as must, goal and what was found.

    python benchmarks/hybrid.py --models ~/models-bench --json figures.json     (about a quarter of an hour)
    python benchmarks/hybrid.py --quick                                         (under five minutes)

The device is ONNX Runtime's CPU provider with one thread on one core, the host's attention runs on another
(`hybrid_machine.py`): two processors that any machine has. Models have random weights in real shapes. All ways through
a setting are measured in turns, and medians of the rates count. Needs pip install 'edge-runtime[onnx]'.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attention as attention_bench
import numpy as np
from hybrid_machine import ROOM, Fixed, Laps, Machine, Setting
from shapes import cached

from edge_runtime.offload.choices import Mode
from edge_runtime.offload.host_rows import HostRows, HostSlice
from edge_runtime.offload.simulator import predict_decode

HYBRID = (Mode.SYNCHRONOUS, Mode.PIPELINED, Mode.OVERLAP)  # and streaming, which copies KV within one memory here
# Batch, tokens, sequences that the device's KV holds. Tokens stay below a class of capacity, with room for the laps.
SHORT_OF_MEMORY = (Setting(16, 3648, 4), Setting(8, 7744, 2), Setting(16, 7744, 4), Setting(8, 15936, 2))
GRID = (*SHORT_OF_MEMORY, Setting(4, 960, 4), Setting(8, 3648, 4), Setting(4, 7744, 0), Setting(16, 960, 8))
HELD_OUT = (Setting(12, 3648, 3), Setting(6, 7744, 2), Setting(12, 1984, 6))
QUICK_SHORT = (SHORT_OF_MEMORY[0], SHORT_OF_MEMORY[-1])
QUICK_GRID, QUICK_HELD_OUT = (*QUICK_SHORT, Setting(4, 960, 4)), HELD_OUT[:1]
FITS = Setting(4, 3648, 4)
SPLIT_TOKENS = 32704


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(name: str, value: float | None, must: float, goal: float, better: str, detail: str) -> dict[str, Any]:
    return {"name": name, "value": value, "must": must, "goal": goal, "better": better, "detail": detail}


@dataclass
class Found:
    """Laps of one setting, by way; what predictions said."""

    setting: Setting
    laps: dict[str, list[Laps]] = field(default_factory=dict)

    def rate(self, way: str) -> float:
        """Tokens per second: median of the rounds."""
        return statistics.median(laps.rate for laps in self.laps[way])

    def best(self, *ways: str) -> tuple[str, float]:
        rates = {way: self.rate(way) for way in ways if way in self.laps}
        name = max(rates, key=lambda way: rates[way])
        return name, rates[name]

    def errors(self) -> list[float]:
        """Of every lap of the product's modes: |predicted / measured - 1|."""
        return [abs(predicted / seconds - 1) for way, rounds in self.laps.items() if not way.startswith("serial")
                for laps in rounds for mode, predicted, seconds in laps.pairs]


def ways_of(machine: Machine, setting: Setting, rounds: int, laps: int) -> Found:
    """Every way through a setting, in turns: the modes, the chosen one, and offload that waits for the host."""
    found = Found(setting)
    schedulers: dict[str, tuple[Any, dict[str, Any]]] = {
        str(mode): (machine.apex(force=mode), {}) for mode in (Mode.DEVICE_ONLY, *HYBRID)
        if setting.pool or mode is not Mode.DEVICE_ONLY}
    schedulers["chosen"] = machine.apex(), {}
    for device in sorted({0, setting.pool}):
        schedulers[f"serial, {device} on the device"] = Fixed(Mode.SYNCHRONOUS, device, machine.cost), {"serial": True}
    layers = machine.config.layers
    with machine.sequences(setting) as live:
        for at in range(rounds):
            for way, (scheduler, options) in schedulers.items():
                overlap = way == str(Mode.OVERLAP) or (way == "chosen" and scheduler.mode is Mode.OVERLAP)
                count, warm = (2 * layers, layers) if overlap else (laps, 2 if at else 4)
                got = machine.laps(live, setting.tokens, scheduler, count=count, warm=warm, **options)
                found.laps.setdefault(way, []).append(got)
    say(f"{setting}: " + ", ".join(f"{way} {found.rate(way):.2f}" for way in found.laps) + " tokens/s; chosen "
        + ", ".join(sorted({str(mode) for laps in found.laps["chosen"] for mode, _, _ in laps.pairs})))
    return found


def short_of_memory(grid: Sequence[Found], settings: Sequence[Setting]) -> list[dict[str, Any]]:
    against_device, against_serial, details, both, bare = [], [], [], [], []
    for found in grid:
        if found.setting not in settings:
            continue
        chosen, device = found.rate("chosen"), found.rate("device-only")
        serial_name, serial = found.best(*(way for way in found.laps if way.startswith("serial")))
        against_device.append(chosen / device)
        against_serial.append(chosen / serial)
        both.append(statistics.median(laps.times.share for laps in found.laps["chosen"]))
        details.append(f"{found.setting}: {chosen:.2f} tokens/s, device-only {device:.2f}")
        bare.append(f"{found.setting}: {chosen:.2f}, {serial_name} {serial:.2f}")
    return [
        row("device KV holds a quarter: hybrid x device-only", geometric(against_device), 1.5, 2.0, "higher",
            f"geometric mean of {listed(against_device)}; {'; '.join(details)}"),
        row("same, x the best offload that waits for the host each layer", geometric(against_serial), 1.2, 1.4,
            "higher", f"geometric mean of {listed(against_serial)}; {'; '.join(bare)}"),
        row("time both processors are busy, of the possible overlap", statistics.median(both), 0.8, 0.95, "higher",
            f"median of {listed(both)} in these settings"),
    ]


def choices(grid: Sequence[Found]) -> list[dict[str, Any]]:
    short, details = [], []
    for found in grid:
        name, best = found.best("device-only", *map(str, HYBRID))
        short.append(max(0.0, 1 - found.rate("chosen") / best))
        details.append(f"{found.setting}: {short[-1]:.1%} below {name}")
    errors = [error for found in grid for error in found.errors()]
    return [
        row("chosen mode, slower than the best of all modes", statistics.mean(short), 0.07, 0.03, "lower",
            f"mean; worst {max(short):.1%}; {'; '.join(details)}"),
        row("predicted lap time, off the measured one: median", statistics.median(errors), 0.10, 0.05, "lower",
            f"{len(errors)} laps of all modes; three quarters are below {np.quantile(errors, 0.75):.1%}"),
    ]


def everything_fits(machine: Machine, rounds: int) -> dict[str, Any]:
    """The machinery's own cost: forced to use the device alone, as it does where it predicts nothing better."""
    slower: list[float] = []
    chosen: list[float] = []
    with machine.sequences(FITS) as live:
        for _ in range(rounds):
            forced = machine.laps(live, FITS.tokens, machine.apex(force=Mode.DEVICE_ONLY), count=6, warm=2)
            bare = machine.bare(live, FITS.tokens, 6)
            free = machine.laps(live, FITS.tokens, machine.apex(), count=6, warm=2)
            median = lambda laps: statistics.median(seconds for _, _, seconds in laps.pairs)
            slower.append(median(forced) / bare - 1)
            chosen.append(median(free) / bare)
    return row("everything fits: slower than device-only", statistics.median(slower), 0.02, 0.0, "lower",
               f"{FITS}: device-only laps of the product against the device's calls alone, medians of 6 laps: "
               f"{listed(slower, 3)}; the product also writes every token's KV to the host. Left to choose, it takes "
               f"{statistics.median(chosen):.2f} of the device's time, with the host's help")


def split(machine: Machine, rounds: int) -> dict[str, Any]:
    """One sequence: the attention of a lap on the host alone, and on both, with the best of a few cuts."""
    tokens, found = SPLIT_TOKENS, {}
    c, a, host = machine.config, machine.accelerator, machine.device._host
    with machine.sequences(Setting(1, tokens, 1)) as live:
        key, table = live[0]
        copy = machine.device._copies[key]
        qkv = np.random.default_rng(1).standard_normal((1, c.q_width + 2 * c.kv_width)).astype(np.float32)
        queries = qkv[:, :c.q_width].reshape(1, c.heads, c.head_size)

        def attention(skip: int) -> float:
            rows = HostRows(c, [HostSlice(table.addresses, tokens, skip=skip)])
            copy.length = skip
            began = time.perf_counter()
            for layer in range(c.layers):
                theirs = host.submit(layer, qkv, rows)
                if skip:
                    a.attend_partial(layer, queries, copy)
                theirs.result()
            return time.perf_counter() - began

        for _ in range(rounds):
            for share in (0, 16, 8, 4, 2):  # one part in so many on the device; 0: none
                skip = tokens // share // 64 * 64 if share else 0
                found.setdefault(share, []).append(a.submit(lambda s=skip: attention(s)).result())
    medians = {share: statistics.median(seconds) for share, seconds in found.items()}
    best = min((share for share in medians if share), key=lambda share: medians[share])
    times = ", ".join(f"1/{share} {seconds * 1e3:.1f} ms" for share, seconds in medians.items() if share)
    return row("split, one sequence at 32k: attention, x host-only", medians[0] / medians[best], 1.4, 1.8, "higher",
               f"{machine.device.kv_layout.dtype} on the host, float32 on the device: host alone "
               f"{medians[0] * 1e3:.1f} ms a lap; part on the device: {times}")


def simulated(machine: Machine, settings: Sequence[Setting], rounds: int, laps: int) -> dict[str, Any]:
    off, details = [], []
    for setting in settings:
        with machine.sequences(setting) as live:
            for mode in (Mode.DEVICE_ONLY, Mode.PIPELINED, None):
                got = [machine.laps(live, setting.tokens, machine.apex(force=mode), count=laps, warm=2).rate
                       for _ in range(rounds)]
                measured = statistics.median(got)
                predicted = predict_decode(machine.curves, [setting.tokens] * setting.batch,
                                           setting.pool * (setting.tokens + ROOM), mode=mode).tokens_per_second
                off.append(abs(predicted / measured - 1))
                details.append(f"{setting}, {mode or 'chosen'}: {predicted:.2f}, measured {measured:.2f}")
    return row("simulator, off this machine's measured runs", statistics.median(off), 0.09, 0.05, "lower",
               f"median of held-out settings, worst {max(off):.1%}: {'; '.join(details)}")


def host_attention(quick: bool) -> list[dict[str, Any]]:
    """One thread, as in the other rows: the worst context of each type counts."""
    rows = []
    for dtype, must, goal in (("int8", 0.45, 0.70), ("fp16", 0.65, 0.85)):
        shape = attention_bench.Shape(64, 4, 8, dtype)
        shares = {tokens: attention_bench.decode_row(shape, tokens, 1, 3 if quick else 7)["value"] / 100
                  for tokens in ((4096, 32768) if quick else (4096, 8192, 16384, 32768))}
        rows.append(row(f"host decode attention, {dtype} KV, D64 group 4: share of read bandwidth",
                        min(shares.values()), must, goal, "higher",
                        ", ".join(f"{tokens // 1024}k {share:.2f}" for tokens, share in shares.items())
                        + "; one thread, random pages, processor time"))
    return rows


def geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))


def listed(values: Sequence[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def verdict(found: dict[str, Any]) -> str:
    sign = 1 if found["better"] == "higher" else -1
    if sign * found["value"] >= sign * found["goal"]:
        return "goal"
    return "must" if sign * found["value"] >= sign * found["must"] else "MISSED"


def measure(models: Path, quick: bool, shape: str) -> list[dict[str, Any]]:
    rounds, laps = (2, 4) if quick else (3, 6)
    rows: list[dict[str, Any]] = []

    def add(make: Callable[[], dict[str, Any] | list[dict[str, Any]]]) -> None:
        found = make()
        for one in found if isinstance(found, list) else [found]:
            rows.append(one)
            say(f"{one['name']}: {one['value']:.4g} ({verdict(one)}) {one['detail']}")

    machine = Machine(cached(shape, "Q4_0", models))
    try:
        machine.profile(25 if quick else 50, say)
        settings = QUICK_SHORT if quick else SHORT_OF_MEMORY
        grid = [ways_of(machine, setting, rounds, laps) for setting in (QUICK_GRID if quick else GRID)]
        add(lambda: short_of_memory(grid, settings))
        add(lambda: choices(grid))
        add(lambda: everything_fits(machine, rounds + 2))
        add(lambda: split(machine, rounds + 2))
        add(lambda: simulated(machine, QUICK_HELD_OUT if quick else HELD_OUT, rounds, laps))
    finally:
        machine.close()
    add(lambda: host_attention(quick))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder for models of random weights; without: a temporary one")
    parser.add_argument("--shape", default="llama1b")
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="write the rows, to a file or stdout")
    parser.add_argument("--quick", action="store_true", help="fewer settings and rounds: under five minutes")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.models or Path(folder), options.quick, options.shape)
    say(f"{time.perf_counter() - began:.0f} s")
    if options.json is not None:
        text = json.dumps(rows, indent=2)
        print(text) if str(options.json) == "-" else options.json.write_text(text + "\n")
    if options.json is None or str(options.json) != "-":
        print("| what | measured | must | goal | | detail |\n|---|---|---|---|---|---|")
        for one in rows:
            print(f"| {one['name']} | {one['value']:.4g} | {one['must']:.4g} | {one['goal']:.4g} | {verdict(one)} | "
                  f"{one['detail']} |")


if __name__ == "__main__":
    main()
