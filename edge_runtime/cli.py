"""The command line, `edge-runtime`. The door of the house: it stands above the apps and opens them when asked."""
from __future__ import annotations

import sys
import warnings
from typing import Annotated, TextIO

import typer

from edge_runtime import (
    cli_bench,
    cli_calibrate,
    cli_chat,
    cli_distill,
    cli_doctor,
    cli_eval,
    cli_model,
    cli_profile,
    cli_pull,
    cli_run,
    cli_serve,
    cli_simulate,
    cli_summarize,
)

app = typer.Typer(
    name="edge-runtime", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Language models on this machine: INT4 files, offline, on the processor you have. Without a model of yours, "
         "the commands use the small one that ships with the package.\n\nStart with:  edge-runtime run \"Hello!\"  or  "
         "edge-runtime doctor")


def _version(wanted: bool) -> None:
    if wanted:
        from edge_runtime import __version__

        print(f"edge-runtime {__version__}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True,
                                                  callback=_version)] = False) -> None:
    pass


app.command("run", help=cli_run.HELP)(cli_run.run)
app.command("chat", help=cli_chat.HELP)(cli_chat.chat)
app.command("summarize", cls=cli_summarize.SummarizeCommand, help=cli_summarize.HELP)(cli_summarize.summarize)
app.command("serve", help=cli_serve.HELP)(cli_serve.serve)
app.command("bench", help=cli_bench.HELP)(cli_bench.bench)
app.command("plan", help=cli_model.PLAN_HELP)(cli_model.plan)
app.command("profile", help=cli_profile.HELP)(cli_profile.profile)
app.command("doctor", help=cli_doctor.HELP)(cli_doctor.doctor)
app.command("quantize", help=cli_model.QUANTIZE_HELP)(cli_model.quantize)
app.command("pull", help=cli_pull.HELP)(cli_pull.pull)
app.add_typer(cli_pull.models)
app.command("calibrate", help=cli_calibrate.HELP)(cli_calibrate.calibrate)
app.command("eval", help=cli_eval.HELP)(cli_eval.evaluate)
app.command("distill", help=cli_distill.HELP)(cli_distill.distill)
app.command("simulate", help=cli_simulate.HELP)(cli_simulate.simulate)


def main() -> None:
    """The console script."""
    warnings.showwarning = _show_warning
    app()


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    """One line on stderr, as errors are; where in our code it was raised helps nobody."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
