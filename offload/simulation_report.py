"""Simulations as tables, JSON and a picture of time."""
from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import InvalidRequestError, MissingExtraError
from edge_runtime.offload.choices import Mode
from edge_runtime.offload.paper_settings import POLICIES, Outcome
from edge_runtime.offload.simulation_result import SimulationResult

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {Mode.DEVICE_ONLY: "#0072B2", Mode.SYNCHRONOUS: "#56B4E9", Mode.PIPELINED: "#E69F00", Mode.OVERLAP: "#009E73",
           Mode.STREAMING: "#CC79A7"}
BINS = 240  # of a picture's width
WIDTH = 118  # characters of a table


def table(results: Sequence[SimulationResult]) -> str:
    """One line per policy."""
    from rich.table import Table

    first = results[0]
    found = Table(title=f"KV pool of the device: {first.pool_tokens:,} tokens, {first.pool_bytes / 1e9:.2f} GB")
    for name in ("policy", "tokens/s", "TTFT s\np50, p99", "TBT ms\np50, p99", "batch", "on\ndevice", "device\nbusy",
                 "host\nbusy", "modes", "requests"):
        found.add_column(name, justify="left" if name in ("policy", "modes") else "right", no_wrap=name == "modes")
    for one in results:
        modes = "\n".join(f"{mode} {share:.0%}" for mode, share in one.modes.items() if share >= 0.005)
        requests = f"{one.requests}" + (f", {one.refused} refused" if one.refused else "")
        found.add_row(one.policy, f"{one.throughput:.1f}", f"{one.ttft.p50:.1f}, {one.ttft.p99:.1f}",
                      f"{1e3 * one.tbt.p50:.0f}, {1e3 * one.tbt.p99:.0f}", f"{one.batch:.1f}", f"{one.on_device:.1f}",
                      f"{one.device_utilization:.0%}", f"{one.host_utilization:.0%}", modes, requests)
    return _text(found)


def paper_table(outcomes: Sequence[Outcome]) -> str:
    """Throughput of each policy as a multiple of gpu-only's, beside what was published."""
    from rich.table import Table

    found = Table(title="Simulated from datasheets: throughput x gpu-only")
    for name in ("setting", "device's KV pool", "gpu-only tok/s", *POLICIES[1:], "published"):
        found.add_column(name, justify="left" if name in ("setting", "published") else "right")
    for one in outcomes:
        base, setting = one.results["gpu-only"], one.setting
        held = setting.pool_tokens / (setting.prompt + setting.output)
        pool = f"{setting.pool_tokens:,} tokens, {base.pool_bytes / 1e9:.2f} GB: {held:.0f} sequences"
        found.add_row(setting.name, pool,
                      f"{base.throughput:.1f}", *(f"{one.ratio(policy):.2f}" for policy in POLICIES[1:]),
                      setting.published)
    return _text(found)


def sensitivity_table(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    from rich.table import Table

    found = Table(title=f"{outcomes[0][1].setting.name}: what the ratios owe to single assumptions")
    policies = [policy for policy in outcomes[0][1].results if policy != "gpu-only"]
    for name in ("assumption", "gpu-only tok/s", *policies):
        found.add_column(name, justify="left" if name == "assumption" else "right")
    for name, one in outcomes:
        found.add_row(name, f"{one.results['gpu-only'].throughput:.1f}",
                      *(f"{one.ratio(policy):.2f}" for policy in policies))
    return _text(found)


def paper_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [{"setting": one.setting.name, "preset": one.setting.preset, "model": one.setting.model,
             "pool_tokens": one.setting.pool_tokens, "published": one.setting.published,
             "ratios": {policy: one.ratio(policy) for policy in one.results},
             "results": {policy: result.as_json() for policy, result in one.results.items()}} for one in outcomes]


def check_timeline(path: Path) -> None:
    """Raise what `timeline` would raise, before anything is simulated."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequestError("timeline", str(path), f"a file with {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing the timeline") from None


def timeline(results: Sequence[SimulationResult], path: Path, title: str) -> None:
    """For each policy: how busy both processors are, coloured by mode, and the rows that run. OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 0.6 + 2.6 * len(results)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    end = max(result.seconds for result in results) or 1.0
    panels = figure.subplots(2 * len(results), 1, sharex=True, squeeze=False)[:, 0]
    for place, result in enumerate(results):
        busy, rows = panels[2 * place:2 * place + 2]
        _busy(busy, result, end)
        _rows(rows, result)
        busy.set_title(f"{result.policy}: {result.throughput:.1f} tokens/s", fontsize=9, loc="left")
        for axis in (busy, rows):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
    panels[-1].set_xlabel("seconds", fontsize=8)
    shown = {mode for result in results for mode in result.modes}
    figure.legend(handles=[Patch(color=COLOURS[mode], label=mode.value) for mode in Mode if mode.value in shown],
                  loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _busy(axis: Any, result: SimulationResult, end: float) -> None:
    """Device upward, host downward, in bins of time; a bin has the colour of the mode that filled most of it."""
    width = end / BINS
    device, host = [0.0] * (BINS + 1), [0.0] * (BINS + 1)
    modes: list[dict[Mode, float]] = [{} for _ in range(BINS + 1)]
    for lap in result.laps:
        at, until = lap.start, lap.start + lap.seconds
        while at < until:
            place = min(int(at / width + 1e-9), BINS)
            step = min((place + 1) * width, until) - at if place < BINS else until - at
            share = step / lap.seconds
            device[place] += lap.device_busy * share / width
            host[place] -= lap.host_busy * share / width
            modes[place][lap.mode] = modes[place].get(lap.mode, 0.0) + step
            at += max(step, width * 1e-6)
    colours = [COLOURS[max(one, key=lambda mode: one[mode])] if one else "#FFFFFF" for one in modes]
    places = [width * (i + 0.5) for i in range(BINS + 1)]
    axis.bar(places, device, width, color=colours)
    axis.bar(places, host, width, color=colours, alpha=0.6)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_ylim(-1.05, 1.05)
    axis.set_yticks([-1, 0, 1], ["host", "", "device"])


def _rows(axis: Any, result: SimulationResult) -> None:
    times = [lap.start for lap in result.laps]
    axis.step(times, [lap.on_device + lap.on_host for lap in result.laps], where="post", color="black", linewidth=0.8,
              label="tokens of a lap")
    axis.step(times, [lap.on_device for lap in result.laps], where="post", color="#0072B2", linewidth=0.8,
              label="of them attended on the device")
    axis.set_ylabel("rows", fontsize=7)
    axis.legend(fontsize=6, frameon=False, loc="upper right")


def _text(found: Any) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(found)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
