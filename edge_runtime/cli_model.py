"""`edge-runtime plan` and `edge-runtime quantize`: a model file, before it is run."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.cli_common import (
    FAILED,
    KV,
    Context,
    Device,
    DeviceMemory,
    Offload,
    TbtMs,
    Threads,
    context_tokens,
    guarded,
    offload_options,
    say,
)
from edge_runtime.errors import InvalidRequestError, OutOfMemoryError

if TYPE_CHECKING:
    from edge_runtime.offload.plan import Plan

PLAN_HELP = """What a model would need of this machine's memory and its device's, from the file's metadata: nothing is
loaded.

The exit code is 1 where it does not fit; what would fit is said then.

Examples:

\b
  edge-runtime plan llama-3.2-1b-instruct-q4_0.gguf
  edge-runtime plan model.gguf --context 32768 --kv fp16
  edge-runtime plan model.gguf --memory-gb 6 --json
  edge-runtime plan model.gguf --device webgpu --device-memory-gb 8 --context 32768
"""

QUANTIZE_HELP = """Write a smaller copy of a float GGUF file (F32, F16 or BF16), or of a Hugging Face folder of
safetensors (llama, mistral, qwen2, qwen3).

Types: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, F16, BF16. The mixtures (_S, _M, and the
last matrix of all) are llama.cpp's, so that a file is as large and as good as its namesake.

Examples:

\b
  edge-runtime quantize model-f16.gguf model-q4_k_m.gguf
  edge-runtime quantize model-bf16.gguf model-q4_0.gguf --type Q4_0
  edge-runtime quantize Qwen2.5-0.5B-Instruct/ qwen2.5-0.5b-q4_0.gguf --type Q4_0
"""


@guarded
def plan(
    model: Annotated[Path | None, typer.Argument(help="GGUF file.", show_default="the bundled model")] = None,
    device: Device = "auto",
    context: Context = "auto",
    kv: KV = "auto",
    memory_gb: Annotated[float | None, typer.Option(help="Memory to plan for, in GB.",
                                                    show_default="what is available now")] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences that are computed at once.")] = 32,
    offload: Offload = "auto",
    device_memory_gb: DeviceMemory = None,
    tbt_ms: TbtMs = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object.")] = False,
) -> None:
    from edge_runtime.llm import LLM
    from edge_runtime.offload.plan import Plan

    if memory_gb is not None and not 0 < memory_gb < 1e9:
        raise InvalidRequestError("memory_gb", memory_gb, "above 0")
    budget = None if memory_gb is None else max(1, int(memory_gb * 1e9))
    try:
        found = LLM.plan_for(model, device=device, context=context_tokens(context), kv=kv, memory_budget=budget,
                             max_batch=max_batch, **offload_options(offload, device_memory_gb, tbt_ms))
    except OutOfMemoryError as error:
        if as_json and isinstance(error.plan, Plan):
            print(_json(error.plan))
            say(f"error: {str(error).splitlines()[0]}")
            raise typer.Exit(FAILED) from None
        raise
    print(_json(found) if as_json else found)


def _json(plan: Plan) -> str:
    return json.dumps({**dataclasses.asdict(plan), "placement": plan.placement, "fits": plan.fits}, indent=2)


@guarded
def quantize(
    source: Annotated[Path, typer.Argument(help="GGUF file in F32, F16 or BF16, or a folder with "
                                               "config.json, tokenizer.json and safetensors.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="File to write.", show_default=False)],
    type_: Annotated[str, typer.Option("--type", "-q", help="Type of the matrices.")] = "Q4_K_M",
    pure: Annotated[bool, typer.Option("--pure", help="One type for all matrices, no mixture.")] = False,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing target.")] = False,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from edge_runtime.conversion import as_gguf
    from edge_runtime.models.quantize_file import quantize_gguf

    if target.exists() and not target.is_file():  # a device would be replaced by a file
        raise InvalidRequestError("target", str(target), "a file, not a folder or a device")
    if not target.parent.is_dir():
        raise InvalidRequestError("target", str(target), "in a folder that exists")
    if target.exists() and not force:
        raise InvalidRequestError("target", str(target), "a file that does not exist yet, or add --force")
    if threads is not None and threads < 1:
        raise InvalidRequestError("threads", threads, "a whole number from 1 up")
    with Progress(console=Console(stderr=True)) as bar, as_gguf(source, target) as file:
        task = bar.add_task("quantizing", total=None)
        written = quantize_gguf(file, target, type_, pure=pure, threads=threads, progress=lambda done, total:
                                bar.update(task, completed=done, total=total))
        before, after = file.stat().st_size, written.stat().st_size
    say(f"{written}: {after / 1e6:.1f} MB, {after / before:.0%} of {before / 1e6:.1f} MB")
