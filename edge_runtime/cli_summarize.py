"""`edge-runtime summarize`: documents or batch requests in, one result each out, resumable."""
from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from edge_runtime.cli_common import (
    FAILED,
    KV,
    Context,
    Device,
    DeviceMemory,
    Model,
    Offload,
    TbtMs,
    Threads,
    context_tokens,
    guarded,
    offload_options,
    open_model,
    say,
)
from edge_runtime.cli_exits import (
    ExitCriterion,
    ExitLayer,
    ExitLayers,
    ExitThresholds,
    ExitWay,
    early_exit_of,
    exit_layers_of,
)
from edge_runtime.cli_summarize_bar import bar
from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.apps.summarizer import Summarizer, Target
    from edge_runtime.apps.summarizer.ledger import Entry
    from edge_runtime.apps.summarizer.sources import Source

HELP = """Summarize documents, offline: one JSON line per document, in the order given.

Text, Markdown, HTML, PDF and Word files; folders are searched for them, patterns are filled in. A document that does
not fit the model's context is cut into chunks at headings, paragraphs or sentences, and the chunks' summaries are
summarized again. A file that cannot be read is reported, as a line with "error" too, and does not stop the rest; the
exit code is then 1. Paths that end in .jsonl are OpenAI batch files, whose requests are answered.

With --out a ledger is kept beside the output: the same command goes on where it was when it was stopped or killed, and
tries again what failed.

Examples:

\b
  edge-runtime summarize examples
  edge-runtime summarize notes/ 'reports/**/*.pdf' --out summaries.jsonl --show
  edge-runtime summarize book.docx -m qwen2.5-1.5b-instruct-q4_k_m.gguf --length long --style bullets
  edge-runtime summarize mail/ --extractive --length 40 --out mail-summaries --format markdown
  edge-runtime summarize requests.jsonl --out answers.jsonl --server http://127.0.0.1:8000
"""
ADDRESS = re.compile(r"auto|local|ray://.+|[\w.-]+:\d+")


class SummarizeCommand(TyperCommand):
    """`--ray` alone means a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        told = []
        for i, argument in enumerate(args):
            told.append(argument)
            if argument == "--ray" and not (i + 1 < len(args) and ADDRESS.fullmatch(args[i + 1])):
                told.append("local")
        return super().parse_args(ctx, told)


@guarded
def summarize(
    paths: Annotated[list[Path], typer.Argument(help="Files, folders and patterns; or OpenAI batch files (.jsonl).",
                                                show_default=False)],
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, or folder for markdown; without: "
                                                                 "standard output.", show_default=False)] = None,
    form: Annotated[str | None, typer.Option("--format", help="jsonl, markdown (a file per document) or batch "
                                                              "(OpenAI's output; the default for batch files).",
                                             show_default="jsonl")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run left, and start over.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print every summary under its name on stderr too.")] = False,
    length: Annotated[str | None, typer.Option(help="short, medium, long, or a number of words.",
                                               show_default="the model's choice")] = None,
    style: Annotated[str | None, typer.Option(help="paragraph, bullets or headline.",
                                              show_default="the model's choice")] = None,
    strategy: Annotated[str, typer.Option(help="auto, whole, map-reduce or refine.")] = "auto",
    extractive: Annotated[bool, typer.Option("--extractive", help="Pick the document's own most informative sentences "
                                                                  "instead of writing new ones.")] = False,
    compress: Annotated[float, typer.Option(help="Share of a document that is read: the least informative sentences "
                                                 "are dropped.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens of a reply.",
                                                   show_default="256, more for longer lengths")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="What to ask; {document} stands for the text.",
                                               show_default="the model's own")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(
        help="Most tokens of a document per request.", show_default="what the context leaves")] = None,
    server: Annotated[list[str] | None, typer.Option(help="URL of a running OpenAI-compatible server; may be given "
                                                          "several times. The key is OPENAI_API_KEY's, or "
                                                          "EDGE_RUNTIME_API_KEY's.",
                                                     show_default=False)] = None,
    server_model: Annotated[str | None, typer.Option(help="Model to name to the servers.",
                                                     show_default="the first they list")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once per server.")] = 16,
    ray: Annotated[str | None, typer.Option(help="Run on Ray Data (extra ray): alone on this machine, or with the "
                                                 "cluster at ADDRESS (auto, host:port).", metavar="[ADDRESS]",
                                            show_default=False)] = None,
    device: Device = "auto",
    context: Context = "auto",
    kv: KV = "auto",
    threads: Threads = None,
    offload: Offload = "auto",
    device_memory_gb: DeviceMemory = None,
    tbt_ms: TbtMs = None,
    early_exit: ExitWay = None,
    exit_layers: ExitLayers = None,
    exit_threshold: ExitThresholds = None,
    exit_criterion: ExitCriterion = "max_prob",
    exit_layer: ExitLayer = None,
) -> None:
    from edge_runtime.apps.summarizer.sources import source_of
    from edge_runtime.apps.summarizer.summarizer import Target

    params = _params(max_tokens, temperature, seed, length)
    batch = all(path.suffix.lower() == ".jsonl" and not path.is_dir() for path in paths)
    # A device or a pipe cannot be gone back in: it is written like standard output, without a ledger.
    stream = sys.stdout.buffer if out is None else None if not _is_stream(out) else open(out, "wb")  # noqa: SIM115
    target = Target(None if stream else out, form or ("batch" if batch else "jsonl"), stream)
    if ray is not None and server:
        raise InvalidRequestError("ray", ray, "used without --server")
    source = source_of(paths, target.files)
    options = {"prompt": None if prompt is None else prompt.replace("\\n", "\n"), "params": params, "length": length,
               "style": style, "strategy": "extractive" if extractive else strategy, "compress": compress,
               "chunk_tokens": chunk_tokens, "requests": source.batch}
    loading = {"device": device, "context": context_tokens(context), "kv": kv, "threads": threads,
               "early_exit": early_exit_of(early_exit, exit_criterion, exit_layer, exit_threshold),
               "exit_layers": exit_layers_of(exit_layers), **offload_options(offload, device_memory_gb, tbt_ms)}
    if ray is not None:
        from edge_runtime.apps.summarizer.ray_pipeline import RaySummarizer

        _run(RaySummarizer(ray, model, loading, options), source, target, fresh, show)
        return
    with contextlib.ExitStack() as stack:
        if server:
            opened: Any = stack.enter_context(_servers(server, server_model, concurrency, model, loading))
        else:
            opened = stack.enter_context(open_model(model, **loading))
            say(f"{opened.plan}\n")
        from edge_runtime.apps.summarizer.summarizer import Summarizer

        _run(Summarizer(opened, **options), source, target, fresh, show)


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _run(summarizer: Summarizer, source: Source, target: Target, fresh: bool, show: bool) -> None:
    from edge_runtime.apps.summarizer.report import closing_report

    noun = "requests" if source.batch else "documents"
    with contextlib.closing(summarizer.run(source, target, fresh=fresh)) as entries, \
            bar(summarizer, source.count(), noun) as report:
        for entry in entries:
            report(_said(entry, show))
    totals = summarizer.totals
    say(closing_report(totals, noun) + (f"\nresults in {target.path}" if target.path else ""))
    if totals.kept and not totals.documents:
        say("all of it was done before; --fresh starts over")
    if totals.failed:
        raise typer.Exit(FAILED)


def _params(max_tokens: int | None, temperature: float, seed: int, length: str | None) -> Any:
    from edge_runtime.apps.summarizer.prompts import Shape
    from edge_runtime.sampling import SamplingParams

    words = Shape.of(length, None).words or 0
    return SamplingParams(max_tokens=max(256, 2 * words) if max_tokens is None else max_tokens,
                          temperature=temperature, seed=seed)


@contextlib.contextmanager
def _servers(urls: list[str], name: str | None, slots: int, model: Path | None,
             loading: dict[str, Any]) -> Iterator[Any]:
    """The servers, and a local model that counts tokens and scores sentences for them."""
    from edge_runtime.apps.summarizer.backend import LocalBackend
    from edge_runtime.apps.summarizer.servers import ServerBackend

    context = loading["context"]
    with open_model(model, **{**loading, "context": "auto"}) as local:
        backend = ServerBackend(urls, LocalBackend(local), model=name, slots=slots,
                                context=None if context == "auto" else context,
                                api_key=os.environ.get("OPENAI_API_KEY") or os.environ.get("EDGE_RUNTIME_API_KEY"))
        with contextlib.closing(backend):
            say(f"{len(urls)} server{'s' * (len(urls) > 1)}, model {backend.model}, {backend.context} tokens of "
                f"context")
            yield backend


def _said(entry: Entry, show: bool) -> str | None:
    """What the reader of the terminal is told of a document."""
    if entry.error is not None:
        told = entry.error["message"]
        return f"error: {told}" if told.startswith(("line ", entry.name)) else f"error: {entry.name}: {told}"
    text = (entry.result or {}).get("text") or ""
    return f"{entry.name}\n  " + text.replace("\n", "\n  ") + "\n" if show else None
