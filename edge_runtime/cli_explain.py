"""`edge-runtime run --explain`: who attended, in which mode, and how well that was predicted."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import mean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.llm import LLM
    from edge_runtime.offload.hybrid_status import LapRecord

HEADER = ("mode", "laps", "rows device + host", "predicted ms", "measured ms", "error", "bound by")


def explained(llm: LLM) -> str:
    """Laps by mode, medians of their times, and what the scheduler weighed for the last one."""
    status, plan = llm.status().placement, llm.plan
    if status is None:
        return f"{plan.placement if plan is not None else 'one device'}: nothing to schedule between device and host"
    lines = [] if plan is None or plan.on_device is None else [f"{plan.placement} ({plan.on_device.reason})"]
    if status.lost:
        lines.append(f"{status.lost} device{'s' * (status.lost > 1)} lost on the way; {status.device} went on")
    if status.short:
        lines.append(f"{status.short} steps found too little memory on the device, and took less")
    if not status.laps:
        return "\n".join([*lines, "no token was decoded: nothing was scheduled"])
    lines += _table([HEADER, *(_row(mode, status.laps, status.modes) for mode in status.modes)])
    error = "" if math.isnan(status.error) else f"; median error of all predictions {status.error:.0%}"
    lines.append(f"device KV at the end: {status.device_tokens:,} of {status.pool_tokens:,} tokens{error}")
    considered = sorted(status.laps[-1].considered.items(), key=lambda item: -item[1])
    if considered:
        lines.append(f"considered for the last lap ({status.laps[-1].mode}), tokens/s: "
                     + ", ".join(f"{mode} {rate:.1f}" for mode, rate in considered))
    return "\n".join(lines)


def _row(mode: str, laps: Sequence[LapRecord], counts: dict[str, int]) -> tuple[str, ...]:
    """Of the laps that are still known; the first ones of a long run are only counted."""
    known = [lap for lap in laps if lap.mode.value == mode]
    if not known:
        return mode, f"{counts[mode]}", "", "", "", "", ""
    timed = [lap for lap in known if lap.predicted > 0 and lap.seconds > 0]
    bound = Counter(lap.bound_by for lap in known).most_common(1)[0][0]
    times = ("", "", "") if not timed else (
        f"{1000 * median(lap.predicted for lap in timed):.2f}", f"{1000 * median(lap.seconds for lap in timed):.2f}",
        f"{median(abs(lap.predicted / lap.seconds - 1) for lap in timed):.0%}")
    rows = f"{mean(lap.on_device for lap in known):.1f} + {mean(lap.on_host for lap in known):.1f}"
    return mode, f"{counts[mode]}", rows, *times, bound


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    # Words to the left, numbers to the right.
    return ["  ".join(cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
