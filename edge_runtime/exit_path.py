"""An order of threshold vectors from the safest to the fastest, learned on sequences that are not tested with it."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_runtime.exit_trace import ExitTrace

LOWEST, HIGHEST = 1e-6, 1 - 1e-5  # above the highest, float32 confidences are rounding noise
MOST_TOKENS = 20_000  # positions that the order is learned from: enough for notches of a few per cent, and instant
PRIOR_TOKENS = 4

Limits = tuple[float, ...]


def safest_to_fastest(trace: ExitTrace, criterion: str) -> list[Limits]:
    """Limits per exit, infinity: no token leaves there. The first is infinity everywhere; each next one lowers one
    exit's limit by a notch, where that gains most layers for the disagreement it costs."""
    few = int(np.searchsorted(trace.starts, MOST_TOKENS, side="right")) - 1
    trace = trace.chosen(range(max(1, min(few, trace.sequences))))
    count, depths = len(trace.exits), np.asarray([*trace.exits, trace.layers])
    lengths = np.diff(trace.starts)
    weights = np.repeat(1 / (trace.sequences * lengths), lengths)
    wrong = np.concatenate((trace.wrong, np.zeros((1, trace.positions), bool)))
    values = trace.confidence[criterion]
    grids = [_notches(values[e], 64 if count <= 3 else 32 if count <= 8 else 16) for e in range(count)]
    at = [-1] * count
    left = np.full(trace.positions, count)
    limits = [math.inf] * count
    path: list[Limits] = [tuple(limits)]
    rates = wrong.mean(axis=1)
    half_a_token = 0.5 / trace.positions  # of doubt in each estimate: many layers gained are not beaten by none lost
    while True:
        best = None
        for e in range(count):
            moved = np.empty(0, np.int64)
            while at[e] + 1 < len(grids[e]):
                moved = np.flatnonzero((values[e] >= np.float32(grids[e][at[e] + 1])) & (left > e))
                if len(moved):
                    break
                at[e] += 1
            if not len(moved):
                continue
            gain = float(((depths[left[moved]] - depths[e]) * weights[moved]).sum())
            seen = float(((wrong[e, moved].astype(int) - wrong[left[moved], moved]) * weights[moved]).sum())
            # Few tokens tell little: their rate of error is drawn towards that of all at this exit.
            trust = len(moved) / (len(moved) + PRIOR_TOKENS)
            cost = trust * seen + (1 - trust) * rates[e] * float(weights[moved].sum())
            score = gain / (max(cost, 0.0) + half_a_token)
            if best is None or score > best[0]:
                best = score, e, moved
        if best is None:
            return path
        _, e, moved = best
        at[e] += 1
        left[moved] = e
        limits[e] = grids[e][at[e]]
        path.append(tuple(limits))


def near(path: list[Limits], trace: ExitTrace, criterion: str, risk: float, shares: Sequence[float]) -> list[Limits]:
    """Of a path, "nothing leaves" and the last ones whose loss on the trace is at most these shares of `risk`, from
    the safest on."""
    losses = [trace.losses(trace.differs(trace.leaves(criterion, limits))).mean() for limits in path]
    wanted = {0} | {max(i for i, loss in enumerate(losses) if loss <= share * risk) for share in shares}
    return [path[i] for i in sorted(wanted)]


def _notches(values: np.ndarray, count: int) -> list[float]:
    """Descending thresholds that let 1 / count, 2 / count ... of the values pass."""
    levels = np.quantile(values.astype(np.float64), 1 - np.arange(1, count + 1) / count)
    return sorted({float(v) for v in np.clip(levels, LOWEST, HIGHEST)}, reverse=True)
