"""A profile's curves as a picture (extra `plot`)."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.errors import InvalidRequestError, MissingExtraError
from edge_runtime.offload.curves import GridPoints
from edge_runtime.offload.profile_store import Profile

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def check_plot(path: Path) -> None:
    """Raise what `draw` would raise, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequestError("plot", str(path), f"a file with {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing the plot") from None


def draw(profile: Profile, path: Path) -> None:
    """Segments and head over rows, attention over tokens on both sides (device: full lines, host: dashed), prompts,
    copies. OSError where the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = profile.curves
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    linear, attention, prompts, copies = figure.subplots(2, 2).flat
    for at, (name, points) in enumerate((("segment, one layer", curves.linear), ("embedding and head", curves.head))):
        linear.plot(*zip(*points), marker="o", markersize=3, color=COLOURS[at], label=name)
    _grids(attention, "rows", curves.device_attention, curves.host_attention)
    _grids(prompts, "rows of a prompt", curves.device_prompt, curves.host_prompt)
    kv = tuple((tokens * curves.kv_bytes_device // curves.layers, seconds) for tokens, seconds in curves.bring)
    for at, (name, points) in enumerate((("to the device", curves.upload), ("to the host", curves.download),
                                         ("KV from pages to the device", kv))):
        if points:
            copies.plot(*zip(*points), marker="o", markersize=3, color=COLOURS[at], label=name)
    for axis, x, y in ((linear, "rows", "seconds"), (attention, "KV tokens per row", "seconds, one layer"),
                       (prompts, "KV tokens before", "seconds, one layer"), (copies, "bytes", "seconds")):
        axis.set(xlabel=x, ylabel=y, yscale="log")
        axis.set_xscale("symlog" if axis is prompts else "log", **({"linthresh": 1000} if axis is prompts else {}))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{profile.setting.device} and {profile.machine.get('processor', 'host')}, "
                    f"profile {profile.fingerprint}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _grids(axis: Any, what: str, device: GridPoints, host: GridPoints) -> None:
    rows = sorted({x for x, _, _ in (*device, *host)})
    for side, points, style in (("device", device, "-"), ("host", host, "--")):
        for at, count in enumerate(rows):
            line = [(tokens, seconds) for x, tokens, seconds in points if x == count]
            if line:
                axis.plot(*zip(*line), marker="o", markersize=3, linestyle=style, color=COLOURS[at % len(COLOURS)],
                          label=f"{side}, {count} {what}")
