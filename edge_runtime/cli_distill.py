"""`edge-runtime distill`: a small model from a large one, on your own text."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli_common import guarded, say
from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.models.recipes.distill_config import DistillConfig
    from edge_runtime.models.recipes.prune import SizePoint

HELP = """Make a small model from a large one, on your own text (extra distill).

The config, TOML or JSON, names the teacher (a GGUF file or a folder of safetensors), the text, and what the student is
made of; docs/distillation.md lists every key. The teacher runs once over the text, its largest logits are kept on disk;
the student is trained on them and written as a GGUF file with the teacher's tokenizer. A run that was stopped or killed
goes on with --resume, to the same losses.

\b
  [teacher]
  model = "qwen2.5-1.5b-instruct-q8_0.gguf"
  [text]
  files = ["notes/", "manual.md"]
  [student]
  layers = 14
  exit_layers = [4, 8]
  [training]
  steps = 2000

Examples:

\b
  edge-runtime distill --config distill.toml --out student/
  edge-runtime distill --config distill.toml --out student/ --resume
  edge-runtime run -m student/student-q4_0.gguf "Hello!"
"""


@guarded
def distill(
    config: Annotated[Path, typer.Option("--config", "-c", help="TOML or JSON file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for cache, checkpoints and the student.")] = Path(
        "distilled"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training that the folder holds.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Read and check the config, and stop.")] = False,
) -> None:
    from edge_runtime.models.recipes.distill_config import read_config

    if not config.is_file():
        raise InvalidRequestError("config", str(config), "a TOML or JSON file that exists")
    chosen = read_config(config)
    if chosen.stage not in ("distill", "curve"):
        from edge_runtime.recipe_stages import run_stage, stage_names

        if chosen.stage in stage_names():
            _recipe_alone(chosen)
        run_stage(chosen.stage, chosen.recipe, out=out, resume=resume, check=check)
        if check:
            say(f"{config}: nothing wrong")
        return
    if chosen.recipe:
        raise InvalidRequestError("recipe", dict(chosen.recipe), f'absent where stage is "{chosen.stage}"')
    chosen.checked()
    if check:
        say(f"{config}: nothing wrong")
        return
    if chosen.stage == "curve":
        _curve(chosen, out, resume)
        return
    from edge_runtime.distillation import distill as run

    with _bars() as progress:
        done = run(chosen, out, resume=resume, progress=progress)
    before, after = done.before, done.after
    say(f"{done.model}: {done.parameters / 1e6:.2f}M parameters, teacher {done.teacher_parameters / 1e6:.2f}M; "
        f"{done.steps} steps in {done.seconds:.0f} s; cache {done.cache_bytes / 1e6:.1f} MB "
        f"({done.bytes_per_token} bytes a token)")
    where = "held-out text" if after["held_out"] else "training text (nothing held out)"
    for name in ("kl", "perplexity"):
        earlier = f"{before[name]:.4g} -> " if name in before else ""
        words = "KL to the teacher, nats a token" if name == "kl" else "perplexity"
        exits = "".join(f", after layer {layer} {figures[name]:.4g}" for layer, figures in after["exits"].items())
        say(f"{words}, {where}: {earlier}{after[name]:.4g}{exits}")


def _recipe_alone(config: DistillConfig) -> None:
    """InvalidRequestError for a table that a stage of the bundled model's recipe would not read."""
    for name in ("teacher", "text", "cache", "student", "training", "export", "curve"):
        if getattr(config, name) != type(getattr(config, name))():
            raise InvalidRequestError("config", name, f'absent where stage is "{config.stage}", whose options are in '
                                                      "recipe")


def _curve(config: DistillConfig, out: Path, resume: bool) -> None:
    from edge_runtime.size_curve import size_curve

    columns = ("layers", "kv_heads", "ffn", "parameters", "bytes", "perplexity", "recovered")

    def row(point: SizePoint) -> None:
        values = [getattr(point, name) for name in columns]
        cells = ("-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)
        print("\t".join(cells), flush=True)

    print("\t".join(columns), flush=True)
    with _bars() as progress:
        size_curve(config, out, resume=resume, progress=progress, report=row)
    say(f"the same as JSON: {out / 'curve.json'}")


@contextlib.contextmanager
def _bars() -> Iterator[Any]:
    """A bar for each phase on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int, entry: dict[str, Any]) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, figures="")
            shown = [f"loss {entry['loss']:.4f}", f"{entry['tokens_per_second']} tokens/s"] if "loss" in entry else []
            bar.update(tasks[phase], completed=done, figures=", ".join(shown))

        yield show
