"""`edge-runtime calibrate`: thresholds of early exit that keep a promise on your own text."""
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
from edge_runtime.errors import CalibrationError, InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.calibration import Calibrated

DOCUMENTS = 3000  # of the bundled model's own kind: 0.05 can be promised with 80 sequences, 0.01 well with thousands

HELP = """Find the fastest thresholds of early exit that keep a promise, and store them for this model.

The promise: with the confidence asked for, tokens that leave early differ from the full model's, given the same text
before them, in no more than the share --risk. The model replies to your texts in full; every exit is then asked at
every token of these replies, and thresholds are tested from the safest to the fastest (Learn-then-Test). What is found
is used by early_exit="recompute" or "propagate"; "verify" gives the full model's tokens without it.

Texts: files and folders, a document each; a .jsonl file holds one per line, under "text". They should be like those
that the model will meet. One that is longer than --passage-tokens is cut. Without --text, the bundled model is
calibrated on held-out documents of its own kind.

Examples:

\b
  edge-runtime calibrate --risk 0.01
  edge-runtime calibrate model.gguf --text mails/ --risk 0.05 --prompt "Summarize this mail:\\n\\n{document}"
  edge-runtime calibrate model.gguf --text notes/ --exit-layers 8,12 --criterion max_prob,entropy
  edge-runtime calibrate model.gguf --text prompts.jsonl --missing-kv propagate --json
"""


@guarded
def calibrate(
    model: Annotated[Path | None, typer.Argument(help="GGUF file.", show_default="the bundled model")] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text files, folders, .jsonl; repeatable.",
                                                    show_default="the bundled model's own kind")] = None,
    risk: Annotated[float, typer.Option(help="Largest share of tokens that may differ.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="How sure that promise is.")] = 0.95,
    criterion: Annotated[str, typer.Option(help="max_prob, margin, entropy; several with commas, or all.")
                         ] = "max_prob",
    exit_layers: ExitLayers = None,
    missing_kv: Annotated[str, typer.Option(help="recompute, propagate; both with a comma, or all.")] = "recompute",
    prompt: Annotated[str | None, typer.Option(help="What to ask; {document} stands for a text.",
                                               show_default="the text itself")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue prompts as they are, not as chat messages.")] = False,
    as_written: Annotated[bool, typer.Option("--as-written", help="Judge at the texts' own tokens, not at those of "
                                                                  "replies to them.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of a reply.")] = 256,
    passage_tokens: Annotated[int | None, typer.Option(help="Most tokens of a text in one sequence.",
                                                       show_default="512, or what the context leaves")] = None,
    documents: Annotated[int, typer.Option(help="Without --text: documents.")] = DOCUMENTS,
    bound: Annotated[str, typer.Option(help="betting, or hoeffding_bentkus (needs more text).")] = "betting",
    seed: Annotated[int, typer.Option(help="Of the draw that decides what is tuned on and what tested on.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file to store to instead.",
                                             show_default="the user's data folder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What is stored, as a JSON list on standard output.")] = False,
    context: Context = "auto",
    threads: Threads = None,
) -> None:
    from edge_runtime import calibration
    from edge_runtime.exit_trace import Replay

    promises = [calibration.Promise(risk, confidence, one, way, bound, seed=seed)
                for way in several(missing_kv, calibration.CALIBRATED_MISSING_KV)
                for one in several(criterion, calibration.CALIBRATED_CRITERIA)]
    if out is not None and out.is_dir():
        raise InvalidRequestError("out", str(out), "a file, not a folder")
    calibration.check_writable(calibration.folder() / "any.json" if out is None else out)
    texts = read_texts(text) if text else None
    if texts is None and model is not None:
        raise InvalidRequestError("text", None, "given for a model of yours: texts like those that it will meet")
    layers = exit_layers_of(exit_layers)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # that these exits were never measured: they are now
        llm = stack.enter_context(open_model(model, context=context_tokens(context), threads=threads,
                                             exit_layers=layers))
        show = stack.enter_context(bars())
        decoded = sequences(llm, texts, documents, show, prompt=prompt, raw=raw, as_written=as_written,
                            max_tokens=max_tokens, passage_tokens=passage_tokens,
                            check=lambda found: calibration.check_enough(llm, found, promises[0]))
        calibration.check_enough(llm, decoded, promises[0])
        trace = Replay(llm).trace(decoded, show("asking the exits"))
        found, failed = [], None
        for promise in promises:
            try:
                found.append(calibration.calibrate(
                    llm, decoded, promise, trace=trace, advance=show(f"replaying, {promise.criterion}") if
                    promise.missing_kv == "propagate" else None, text=", ".join(map(str, text)) if text else
                    f"{len(decoded)} held-out documents of the bundled model's kind"))
            except CalibrationError as error:
                failed = error
                if len(promises) > 1:
                    say(f"{promise.criterion}, {promise.missing_kv}: {error}")
    if failed is not None and not found:
        raise failed
    for one in found:
        _tell(one)
        if out is None:
            say(f"stored in {calibration.save(one.calibration)}")
    made = [one.calibration.as_json() for one in found]
    if out is not None:
        calibration.write_json(out, made)
        say(f"stored in {out}")
    if as_json:
        print(json.dumps(made, indent=2))


def _tell(found: Calibrated) -> None:
    """Per exit what calibration measured, and what the promise is worth."""
    made = found.calibration
    say(f"\n{made.model}: {made.criterion}, {made.missing_kv}; {made.sequences} sequences of {made.documents} "
        f"documents, {made.tokens} tokens")
    say("exit   tokens right if all leave   threshold   tokens that leave")
    for layer in made.exit_layers:
        limit = made.thresholds.get(layer)
        say(f"{layer:4}   {found.agreement[layer]:25.1%}   {'-' if limit is None else f'{limit:.5f}':>9}   "
            f"{found.measured.leaving.get(layer, 0):17.1%}")
    say(f"{made.layers_per_token:.2f} of {made.layers} layers per token ({-made.saved:+.0%}), {made.measured_risk:.2%} "
        f"of a reply's tokens differ; at most {made.risk:g} with confidence {made.confidence:g}")
    if not made.trained:
        say(f"warning: the model was not trained to be left after layers {', '.join(map(str, made.exit_layers))}: "
            "calibration measured the figures above, and other text may do worse")
    if made.sequences > 2 * made.documents:
        say(f"warning: {made.sequences} passages of {made.documents} documents count as independent, which passages of "
            "one document are not quite: more documents make the promise firmer")
