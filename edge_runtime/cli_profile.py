"""`edge-runtime profile`: what an accelerator and this processor take for the parts of a layer."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.cli_common import compiling, guarded, say
from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.offload.curves import GridPoints, Points
    from edge_runtime.offload.profile_store import Profile

HELP = """Measure what hybrid execution decides by, on this machine and model.

Per layer: the linear segments for 1 to 512 rows, attention on the device and on this processor over up to 64k tokens,
copies between them, and how much both slow down when they work at the same time. The profile is stored and used from
then on; it is measured anew when the machine, its software or the model changes, or with --fresh.

Examples:

\b
  edge-runtime profile                                           the bundled model on ONNX Runtime's CPU provider
  edge-runtime profile model.gguf --device webgpu --plot curves.png
  edge-runtime profile model.gguf --fresh --seconds 30 --json > profile.json
  edge-runtime profile --threads 2 --host-threads 1 --device-cores 0 --host-cores 1
"""

Cores = Annotated[str, typer.Option(help="Processors it stays on, such as 0,1.", show_default="all")]


@guarded
def profile(
    model: Annotated[Path | None, typer.Argument(help="GGUF file.", show_default="the bundled model")] = None,
    device: Annotated[str, typer.Option(help="onnx:cpu, webgpu, cuda, openvino, qnn, coreml, directml, "
                                             "vitisai.")] = "onnx:cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure even where a profile is stored.")] = False,
    seconds: Annotated[float, typer.Option(help="To measure for, about.")] = 48.0,
    kv: Annotated[str, typer.Option(help="How this processor keeps KV: int8 or fp16.")] = "int8",
    precision: Annotated[str, typer.Option(help="The device's products: float32, or int8 where it has "
                                                "them.")] = "float32",
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Threads of both together.",
                                                show_default="all physical cores")] = None,
    host_threads: Annotated[int | None, typer.Option(help="Of them, threads of this processor's attention.",
                                                     show_default=False)] = None,
    device_cores: Cores = "",
    host_cores: Cores = "",
    as_json: Annotated[bool, typer.Option("--json", help="The profile as JSON on standard output.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file: .png, .svg or .pdf (extra plot).",
                                              show_default=False)] = None,
) -> None:
    from edge_runtime.offload.planner import OffloadOptions
    from edge_runtime.profiling import open_and_profile

    if plot is not None:
        from edge_runtime.apps.profile_plot import check_plot

        check_plot(plot)
    for name, value in (("threads", threads), ("host_threads", host_threads)):
        if value is not None and value < 1:
            raise InvalidRequestError(name, value, "1 or more")
    options = OffloadOptions(host_threads=host_threads, host_cores=_cores("host_cores", host_cores),
                             device_cores=_cores("device_cores", device_cores)).check()
    with compiling() as kernels, _measuring() as tell:
        found, measured = open_and_profile(model, device, kv=kv, precision=precision, threads=threads, options=options,
                                           fresh=fresh, seconds=seconds, compiling=kernels, progress=tell)
    if as_json:
        print(json.dumps({**found.as_json(), "measured_now": measured}, indent=1))
    else:
        _print(found, measured)
    if plot is not None:
        from edge_runtime.apps.profile_plot import draw

        draw(found, plot)
        say(f"curves drawn: {plot}")


def _cores(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidRequestError(name, text, "numbers of processors with commas between, such as 0,1") from None


@contextlib.contextmanager
def _measuring() -> Iterator[Callable[[str], None]]:
    """A function to tell what is measured now; it is shown on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("measuring") as status:
        yield lambda text: status.update(f"measuring {text}")


def _print(found: Profile, measured: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, curves = Console(width=120, highlight=False, markup=False), found.curves
    state = f"measured now in {found.seconds:.1f} s" if measured else \
        f"stored, measured {found.date} in {found.seconds:.1f} s"
    setting = found.setting
    facts = [("profile", f"{found.fingerprint}, {state}"),
             ("device", f"{setting.device}, {found.machine.get('hardware', '')}, {setting.precision} products, "
                        f"{setting.device_threads} threads"),
             ("host", f"{found.machine.get('processor', '')}, {setting.kv} KV, {setting.host_threads} threads"),
             ("both at once", f"device {curves.contention_device:.2f} x as long, host {curves.contention_host:.2f} x"),
             ("handover", f"{_time(curves.handover)} a layer"),
             *((("extrapolated" if i == 0 else "", note) for i, note in enumerate(found.notes)))]
    for name, value in facts:
        console.print(f"{name:<13}{value}")

    def line(title: str, *columns: tuple[str, Points], first: str, sizes: bool = False) -> None:
        console.print(f"\n{title}")
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column(first, justify="right")
        for name, _ in columns:
            table.add_column(name, justify="right")
        for place in sorted({x for _, points in columns for x, _ in points}):
            table.add_row(_size(place) if sizes else f"{place:,}",
                          *(_time(dict(points).get(place)) for _, points in columns))
        console.print(table)

    def grid(title: str, points: GridPoints, across: str) -> None:
        places = sorted({y for _, y, _ in points})
        console.print(f"\n{title}")
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column("rows", justify="right")
        for place in places:
            table.add_column(f"{place:,} {across}", justify="right")
        at = {(x, y): seconds for x, y, seconds in points}
        for rows in sorted({x for x, _, _ in points}):
            table.add_row(f"{rows:,}", *(_time(at.get((rows, place))) for place in places))
        console.print(table)

    line(f"One of {curves.layers} layers without its attention; once a step, what comes before and after",
         ("segment", curves.linear), ("embedding and head", curves.head), first="rows")
    grid("Decode attention of a layer on the device", curves.device_attention, "tokens")
    grid("Decode attention of a layer on the host", curves.host_attention, "tokens")
    grid("Prompt attention of a layer on the device", curves.device_prompt, "before")
    grid("Prompt attention of a layer on the host", curves.host_prompt, "before")
    line("Copies", ("to the device", curves.upload), ("to the host", curves.download), first="bytes", sizes=True)
    line("KV of a layer, from the host's pages to the device", ("time", curves.bring), first="tokens")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"

