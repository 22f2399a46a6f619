"""`edge-runtime bench`: tokens per second of a model, beside llama.cpp's where it is installed."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.cli_common import Threads, guarded, say
from edge_runtime.cli_exits import (
    ExitCriterion,
    ExitLayer,
    ExitLayers,
    ExitThresholds,
    early_exit_of,
    exit_layers_of,
)
from edge_runtime.errors import InvalidRequestError

HELP = """Measure a model on this machine, and llama.cpp on the same file, in turns.

Rows: prefill_N (a prompt of N tokens), decode_at_D (one sequence whose KV holds D tokens), batch_B (B sequences
together after prompts of 256), load and first token, peak memory. Medians of --repeat runs. With --early-exit:
reply_full and reply_WAY, greedy replies with the layers that tokens left after.

Examples:

\b
  edge-runtime bench                                            the bundled model, alone
  edge-runtime bench model.gguf --prefill 512 --decode 64 --depth 0,4096 --batch 1,8,16,32 --vs llama.cpp
  edge-runtime bench --early-exit verify,propagate --exit-threshold 2=0.9
  edge-runtime bench model.gguf --vs llama.cpp --json > figures.json
"""


@guarded
def bench(
    model: Annotated[Path | None, typer.Argument(help="GGUF file.", show_default="the bundled model")] = None,
    prefill: Annotated[str, typer.Option(help="Prompt lengths, such as 512,2048.")] = "512",
    decode: Annotated[int, typer.Option(help="Tokens of each decoding run.")] = 64,
    depth: Annotated[str, typer.Option(help="KV lengths to decode at.")] = "0",
    batch: Annotated[str, typer.Option(help="Numbers of sequences that decode together; empty: none.")] = "",
    versus: Annotated[str | None, typer.Option("--vs", help="llama.cpp: measured in turns with ours.",
                                               show_default=False)] = None,
    threads: Threads = None,
    repeat: Annotated[int, typer.Option(help="Runs of each row.")] = 3,
    kv: Annotated[str, typer.Option(help="How our KV cache is kept: int8 or fp16.")] = "int8",
    early_exit: Annotated[str | None, typer.Option(
        "--early-exit", help="Replies with early exit beside full ones: verify, recompute, propagate, with commas.",
        show_default=False)] = None,
    exit_layers: ExitLayers = None,
    exit_threshold: ExitThresholds = None,
    exit_criterion: ExitCriterion = "max_prob",
    exit_layer: ExitLayer = None,
    text: Annotated[list[Path] | None, typer.Option(help="Prompts for --early-exit, a file each; repeatable.",
                                                    show_default="a short report to summarize")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows as a JSON list on standard output.")] = False,
) -> None:
    from edge_runtime.apps.bench import BenchPlan, format_rows, run_bench
    from edge_runtime.loading import resolve

    if versus not in (None, "llama.cpp"):
        raise InvalidRequestError("vs", versus, "llama.cpp")
    wanted = BenchPlan(prefill=_numbers("prefill", prefill), decode=decode, depth=_numbers("depth", depth, 0),
                       batch=_numbers("batch", batch), repeat=repeat, threads=threads, kv=kv, peer=versus is not None)
    ways = [early_exit_of(way.strip(), exit_criterion, exit_layer, exit_threshold)
            for way in (early_exit or "").split(",") if way.strip()]
    if not ways and early_exit_of(None, exit_criterion, exit_layer, exit_threshold) is None and text:
        raise InvalidRequestError("text", [str(one) for one in text], "given with --early-exit")
    rows = run_bench(resolve(model), wanted, say)
    if ways:
        from edge_runtime.apps.bench_exits import REPORT, bench_exits
        from edge_runtime.models.bundled import summarize_prompt

        texts = [one.read_text(encoding="utf-8") for one in text or []] or [summarize_prompt(REPORT)]
        rows += bench_exits(resolve(model), ways, texts, tokens=decode, repeat=repeat, threads=threads, kv=kv,
                            exit_layers=exit_layers_of(exit_layers), say=say)
    print(json.dumps(rows, indent=2) if as_json else format_rows(rows))


def _numbers(name: str, text: str, least: int = 1) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidRequestError(name, text, "whole numbers with commas between, such as 0,4096") from None
    for number in numbers:
        if number < least:
            raise InvalidRequestError(name, number, f"{least} or more")
    return numbers
