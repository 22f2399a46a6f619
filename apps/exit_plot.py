"""The curve of early exit as a picture (extra `plot`)."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_runtime.apps.exit_curve import Point
from edge_runtime.errors import InvalidRequestError, MissingExtraError

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"max_prob": "#0072B2", "margin": "#009E73", "entropy": "#D55E00", "layer": "#CC79A7"}
MARKS = {"full": ("*", "#000000"), "verify": ("D", "#E69F00")}


def check_plot(path: Path) -> None:
    """Raise what `draw` would raise, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequestError("exits", str(path), f"a file with {', '.join(SUFFIXES)}, or .json for numbers alone")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing the plot") from None


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Agreement against layers per token and, where replies were made, against tokens per second; key facts where they
    are known. OSError where the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = any(p.tokens_per_second is not None for p in points)
    known = any(p.facts_kept is not None for p in points)
    panels = [("layers_per_token", "agreement", "layers per token (fewer is faster)", "tokens as the full model's, %")]
    if timed:
        panels.append(("tokens_per_second", "agreement", "tokens per second", "tokens as the full model's, %"))
    if known:
        panels.append(("tokens_per_second", "facts_kept", "tokens per second", "key facts kept, %"))
    figure = Figure(figsize=(5.2 * len(panels), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (x, y, x_name, y_name) in zip(axes, panels):
        _panel(axis, points, x, y)
        axis.set_xlabel(x_name)
        axis.set_ylabel(y_name)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if x == "layers_per_token":
            axis.invert_xaxis()
    axes[0].legend(loc="lower left", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axis: Any, points: Sequence[Point], x: str, y: str) -> None:
    seen = [p for p in points if getattr(p, x) is not None and getattr(p, y) is not None]
    at = lambda p: (getattr(p, x), 100 * getattr(p, y))
    for criterion, colour in COLOURS.items():
        own = [p for p in seen if p.criterion == criterion and p.kind in ("layer", "threshold")]  # by threshold
        if own:
            axis.plot(*zip(*map(at, own)), color=colour, marker="s" if criterion == "layer" else "o", markersize=4,
                      linewidth=0 if criterion == "layer" else 1.2,
                      label="always at a layer" if criterion == "layer" else criterion)
        for p in own if criterion == "layer" else ():
            axis.annotate(p.name.removeprefix("layer "), at(p), xytext=(4, 4), textcoords="offset points", fontsize=8)
        for p in seen:
            if p.kind == "calibrated" and p.criterion == criterion:
                axis.plot(*at(p), color=colour, marker="P", markersize=10, markeredgecolor="white", linewidth=0,
                          label=f"{criterion}, calibrated")
    for kind, (mark, colour) in MARKS.items():
        for p in seen:
            if p.kind == kind and not (kind == "verify" and x == "layers_per_token"):
                axis.plot(*at(p), color=colour, marker=mark, markersize=10, linewidth=0, label=p.name)
                axis.annotate(p.name, at(p), xytext=(0, -14), textcoords="offset points", fontsize=8, ha="center")
