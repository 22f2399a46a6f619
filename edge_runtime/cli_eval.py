"""`edge-runtime eval`: what leaving early costs in quality and gains in speed, as numbers and as a plot."""
from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.cli_common import Context, Threads, context_tokens, guarded, open_model, say
from edge_runtime.cli_exits import ExitLayers, exit_layers_of
from edge_runtime.cli_texts import bars, read_texts, sequences, several
from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.apps.exit_curve import Task
    from edge_runtime.exit_trace import Decoded

HELP = """Quality against speed of early exit, for thresholds and layers.

Quality: the share of tokens that are the full model's, given the same text before them; for the bundled model also the
key facts that its summaries keep. Speed: layers per token, and tokens per second of whole replies, one at a time. The
numbers are printed and written as JSON beside the plot (extra plot; with a name that ends in .json, numbers alone).

Examples:

\b
  edge-runtime eval --exits exits.png
  edge-runtime eval model.gguf --exits exits.svg --text notes/ --criterion all
  edge-runtime eval model.gguf --exits exits.json --text notes/ --exit-layers 8,12 --replies 0
"""


@guarded
def evaluate(
    model: Annotated[Path | None, typer.Argument(help="GGUF file.", show_default="the bundled model")] = None,
    exits: Annotated[Path | None, typer.Option("--exits", help="Plot to write: .png, .svg, .pdf; or .json.",
                                               show_default=False)] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text files, folders, .jsonl; repeatable.",
                                                    show_default="the bundled model's own kind")] = None,
    criterion: Annotated[str, typer.Option(help="max_prob, margin, entropy; several with commas, or all. Replies are "
                                                "timed with the first.")] = "all",
    exit_layers: ExitLayers = None,
    missing_kv: Annotated[str, typer.Option(help="recompute or propagate: how replies are timed.")] = "recompute",
    prompt: Annotated[str | None, typer.Option(help="What to ask; {document} stands for a text.",
                                               show_default="the text itself")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue prompts as they are, not as chat messages.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of a reply.")] = 256,
    passage_tokens: Annotated[int | None, typer.Option(help="Most tokens of a text in one sequence.",
                                                       show_default="512, or what the context leaves")] = None,
    documents: Annotated[int, typer.Option(help="Without --text: documents to judge on.")] = 200,
    replies: Annotated[int, typer.Option(help="Replies that are timed, of each setting; 0: none.")] = 8,
    repeat: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON on standard output.")] = False,
    context: Context = "auto",
    threads: Threads = None,
) -> None:
    from edge_runtime import calibration
    from edge_runtime.apps import exit_curve, exit_plot
    from edge_runtime.exit_trace import Replay

    if exits is None or not exits.name:
        raise InvalidRequestError("exits", None, "given: the plot to write, such as exits.png")
    criteria = several(criterion, calibration.CALIBRATED_CRITERIA)
    for one in criteria:
        calibration.Promise(criterion=one)
    calibration.Promise(missing_kv=missing_kv)
    if replies < 0 or repeat < 1:
        raise InvalidRequestError("replies" if replies < 0 else "repeat", min(replies, repeat), "0 or more, in 1 run "
                                                                                               "or more")
    numbers = exits.with_suffix(".json")
    if exits != numbers:
        exit_plot.check_plot(exits)
    for file in {exits, numbers}:
        calibration.check_writable(file)
    texts = read_texts(text) if text else None
    if texts is None and model is not None:
        raise InvalidRequestError("text", None, "given for a model of yours: texts like those that it will meet")
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # that these exits were never measured: they are now
        llm = stack.enter_context(open_model(model, context=context_tokens(context), threads=threads,
                                             exit_layers=exit_layers_of(exit_layers)))
        known = {one: calibration.load(llm._loaded.fingerprint(), one, missing_kv, llm.exit_layers) or {}
                 for one in criteria}
        chosen = exit_curve.settings(llm.exit_layers, criteria, missing_kv, known)
        show = stack.enter_context(bars())
        decoded = sequences(llm, texts, documents, show, prompt=prompt, raw=raw, as_written=False,
                            max_tokens=max_tokens, passage_tokens=passage_tokens, seed=_judged_seed())
        if not decoded:
            raise InvalidRequestError("text", len(texts or ()), "texts that the model replies to in two tokens or more")
        trace = Replay(llm).trace(decoded, show("asking the exits"))
        points = [exit_curve.quality(trace, setting) for setting in chosen]
        if replies:
            timed = [i for i, setting in enumerate(chosen) if setting.kind != "threshold"
                     or points[i].criterion == criteria[0]]
            tasks = [_task(one, texts is None) for one in decoded[:replies]]
            measured = exit_curve.speed(llm, [points[i] for i in timed], [chosen[i] for i in timed], tasks, max_tokens,
                                        repeat, show("timing replies"))
            for i, point in zip(timed, measured):
                points[i] = point
        name = llm.config.name if llm.config else "model"
    made = {"model": name, "layers": trace.layers, "exit_layers": list(trace.exits), "missing_kv": missing_kv,
            "sequences": trace.sequences, "tokens": trace.positions, "replies": min(replies, len(decoded)),
            "points": [point.as_json() for point in points]}
    calibration.write_json(numbers, made)
    if exits != numbers:
        exit_plot.draw(points, exits, f"{name}: early exit, {missing_kv}; {trace.positions} tokens of "
                                      f"{trace.sequences} replies")
    print(json.dumps(made, indent=2) if as_json else exit_curve.table(points))
    say(f"numbers in {numbers}" + (f", plot in {exits}" if exits != numbers else ""))


def _judged_seed() -> int:
    from edge_runtime.calibration_corpus import JUDGED_SEED

    return JUDGED_SEED


def _task(one: Decoded, bundled: bool) -> Task:
    from edge_runtime.apps.exit_curve import Task
    from edge_runtime.calibration_corpus import JUDGED_SEED, facts

    return Task(one.prompt.tolist(), facts(one.document, JUDGED_SEED) if bundled else ())
