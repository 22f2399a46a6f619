"""`edge-runtime pull` and `edge-runtime models`: model files from a hub, and what is here of them."""
from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from edge_runtime.cli_common import guarded, say
from edge_runtime.errors import InvalidRequestError

HELP = """Download a model from the Hugging Face hub, so that it can be opened by its name.

NAME is org/repo, with :QUANT (Q4_0, Q4_K_M, ...) or :file.gguf where the repository has several, and @REVISION where
a branch, tag or commit is meant. Without a quantization: Q4_0, else the next in the order Q4_K_M, Q4_K_S, Q4_1, Q5_0
... Q8_0, F16. A download that was broken off goes on where it was; the hash of the file is checked. The path of the
file is printed on standard output.

HF_TOKEN: token for private repositories. HF_ENDPOINT: another hub. HF_HUB_CACHE: where models are kept (shared with
other tools of Hugging Face). HF_HUB_OFFLINE=1: as --offline.

Examples:

\b
  edge-runtime pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_0
  edge-runtime run -m bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_0 "Hello!"
  edge-runtime pull Qwen/Qwen2.5-0.5B-Instruct-GGUF --revision main
  edge-runtime models list
"""

MODELS_HELP = """Models that were pulled: list them, remove them.

Examples:

\b
  edge-runtime models list
  edge-runtime models remove bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_0
"""

models = typer.Typer(name="models", no_args_is_help=True, rich_markup_mode=None, help=MODELS_HELP)


@guarded
def pull(
    name: Annotated[str, typer.Argument(help="org/repo[:QUANT or :file.gguf][@revision]", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what is here; ask no server.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Name, path, commit, bytes as one JSON object.")] = False,
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from edge_runtime.models import hub

    console = Console(stderr=True, highlight=False)
    with Progress(TextColumn("downloading"), BarColumn(24), DownloadColumn(), TransferSpeedColumn(),
                  TimeRemainingColumn(), console=console, redirect_stdout=False, transient=True) as bar:
        task = bar.add_task("downloading", total=None, visible=False)
        found = hub.pull(name, revision=revision, offline=True if offline else None,
                         say=lambda text: bar.console.print(text, markup=False, soft_wrap=True),
                         progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True))
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "path": str(found.path)}, indent=2))
        return
    came = (f"{found.fetched / 1e6:.1f} MB came now, the hash is right" if found.fetched or found.resumed
            else "it was here already")
    say(f"{found.name}: {came}. Open it with: edge-runtime run -m {found.name} ...")
    print(found.path)


@models.command("list", help="Models on this machine that came from a hub: name, size, commit, path.")
@guarded
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list, sizes in bytes.")] = False,
) -> None:
    from edge_runtime.models import hub

    found = hub.installed()
    if as_json:
        print(json.dumps([{**dataclasses.asdict(model), "path": str(model.path)} for model in found], indent=2))
        return
    if not found:
        say("no models yet: edge-runtime pull org/repo:Q4_0")
        return
    width = max(len(model.name) for model in found)
    for model in found:
        print(f"{model.name:{width}}  {model.nbytes / 1e6:10.1f} MB  {model.commit[:12]}  {model.path}")


@models.command("rm", hidden=True, help="`remove`, by the name it has elsewhere.")
@models.command("remove", help="Delete a pulled model; a name without quantization: all GGUF files of the repository.")
@guarded
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As `models list` shows them.",
                                               show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, where a name means several files.")] = False,
) -> None:
    from edge_runtime.models import hub

    for name in names:
        wanted = hub.removable(name)
        if len(wanted) > 1 and not yes:
            raise InvalidRequestError("name", name, "one file, or add --yes to remove all of: " + ", ".join(
                model.name for model in wanted))
        gone, freed = hub.remove(name)
        what = ", ".join(model.name for model in gone) or "an unfinished download"
        say(f"removed {what}: {freed / 1e6:.1f} MB freed")
