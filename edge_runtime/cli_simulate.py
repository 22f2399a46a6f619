"""`edge-runtime simulate`: what the scheduler would make of a machine and a load."""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.cli_common import guarded, say
from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.offload.curves import Curves
    from edge_runtime.offload.simulator import Limits
    from edge_runtime.offload.traces import Request

HELP = """Simulate policies on a machine described by its datasheet, or measured by `edge-runtime profile`.

The scheduler is the one that runs models; only time is simulated. Policies: apex (chooses among all modes), gpu-only,
neo (two sub-batches), streaming (KV copied to the device), apex-paper (the modes of APEX), and single modes:
synchronous, pipelined, overlap. Machines: t4-4, t4-8, t4-16, a10-8, a10-16, a10-32, a10-64, rtx4060, core-ultra-gpu,
core-ultra-npu, apple-m1-max, h200. Models: llama2-7b, llama3.1-8b, llama3.1-8b-q4, llama1b-q4.

Examples:

\b
  edge-runtime simulate                                          a sample of Azure's conversations on a T4
  edge-runtime simulate --preset a10-16 --model llama3.1-8b --synthetic 1000,200 --policy apex,gpu-only,neo
  edge-runtime simulate --trace requests.csv --rate 2 --timeline timeline.png --json
  edge-runtime simulate --profile profile.json --pool-tokens 20000 --synthetic 4000,200
  edge-runtime simulate --paper                                  the settings of APEX and NEO, beside their figures
"""


@guarded
def simulate(
    preset: Annotated[str, typer.Option(help="The machine.")] = "t4-8",
    model: Annotated[str, typer.Option("--model", "-m", help="The model.")] = "llama2-7b",
    profile: Annotated[Path | None, typer.Option(help="A measured profile (JSON) instead of a machine and a model.",
                                                 show_default=False)] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens; or "
                                                    "prompt_tokens, output_tokens, with arrival or without.",
                                               show_default="a sample of Azure's conversations")] = None,
    synthetic: Annotated[str | None, typer.Option(help="Prompt and reply tokens, such as 1000,200, instead of a trace.",
                                                  show_default=False)] = None,
    requests: Annotated[int, typer.Option(help="Requests, at most.")] = 100,
    rate: Annotated[float | None, typer.Option(help="Requests per second, as a Poisson process; 0: all at once.",
                                               show_default="as the trace says; synthetic: all at once")] = None,
    policy: Annotated[str, typer.Option(help="Policies, with commas between.")] = "apex,gpu-only,neo,streaming",
    pool_tokens: Annotated[int | None, typer.Option(help="KV tokens that the device holds.",
                                                    show_default="what weights leave of its memory")] = None,
    host_tokens: Annotated[int | None, typer.Option(help="KV tokens that the host holds.",
                                                    show_default="3/4 of its memory")] = None,
    kv: Annotated[str, typer.Option(help="How the host keeps KV: int8 or fp16.")] = "int8",
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 256,
    chunk: Annotated[int, typer.Option(help="Prompt tokens of a lap.")] = 512,
    tbt_ms: Annotated[float | None, typer.Option("--tbt-ms", help="All requests are interactive; longest lap.",
                                                 show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    paper: Annotated[bool, typer.Option("--paper", help="The settings of APEX and NEO; takes some minutes.")] = False,
    timeline: Annotated[Path | None, typer.Option(help="Draw the laps into this file: .png, .svg or .pdf (extra plot).",
                                                  show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.")] = False,
) -> None:
    from edge_runtime.offload import simulation_report as report
    from edge_runtime.offload.simulator import POLICIES
    from edge_runtime.offload.simulator import simulate as run

    if timeline is not None:
        report.check_timeline(timeline)
    if paper:
        _paper(as_json)
        return
    policies = [name.strip() for name in policy.split(",") if name.strip()]
    for name in policies or [policy]:
        if name not in POLICIES:
            raise InvalidRequestError("policy", name, f"one or more of {', '.join(POLICIES)}")
    what, curves, limits = _machine(preset, model, profile, kv, pool_tokens, host_tokens, batch, chunk, tbt_ms)
    load = _requests(trace, synthetic, requests, rate, seed, tbt_ms is not None)
    say(f"{what}: {len(load)} requests, {sum(one.prompt for one in load):,} prompt tokens, "
        f"{sum(one.output for one in load):,} tokens to generate")
    results = [run(curves, load, limits, name) for name in policies]
    print(json.dumps([one.as_json() for one in results], indent=2) if as_json else report.table(results))
    if timeline is not None:
        report.timeline(results, timeline, what)


def _paper(as_json: bool) -> None:
    from edge_runtime.offload import paper_settings
    from edge_runtime.offload import simulation_report as report

    outcomes = list(paper_settings.run(progress=say))
    if as_json:
        print(json.dumps(report.paper_json(outcomes), indent=2))
        return
    print(report.paper_table(outcomes))
    for setting in (paper_settings.T4, paper_settings.STRONG_HOST):
        print(report.sensitivity_table(paper_settings.sensitivity(setting, progress=say)))


def _machine(preset: str, model: str, profile: Path | None, kv: str, pool_tokens: int | None, host_tokens: int | None,
             batch: int, chunk: int, tbt_ms: float | None) -> tuple[str, Curves, Limits]:
    """Its name, curves and limits."""
    from edge_runtime.offload import hardware_presets
    from edge_runtime.offload.hardware import describe, device_pool, host_pool
    from edge_runtime.offload.simulator import Limits

    if tbt_ms is not None and not 0 < tbt_ms < 1e9:
        raise InvalidRequestError("tbt_ms", tbt_ms, "milliseconds, above 0")
    if profile is not None:
        from edge_runtime.offload.profile_store import read

        if pool_tokens is None:
            raise InvalidRequestError("pool_tokens", pool_tokens, "given with --profile: a profile does not know it")
        name, curves, room = str(profile), read(profile).curves, pool_tokens
        host_room = host_tokens or max(4 * pool_tokens, 1 << 20)
    else:
        machine, shape = hardware_presets.machine(preset), hardware_presets.model(model)
        name, curves = f"{machine.name}, {shape.name}", describe(machine, shape, kv)
        room, host_room = device_pool(machine, shape), host_pool(machine, shape, kv)
        if not room and pool_tokens is None:
            raise InvalidRequestError("model", model, f"smaller: its weights take {shape.weight_bytes / 1e9:.1f} GB, "
                                      f"{machine.device.name} has {machine.device.memory / 1e9:.0f} GB")
    return name, curves, Limits(room if pool_tokens is None else pool_tokens,
                                host_room if host_tokens is None else host_tokens, batch, chunk,
                                tbt_seconds=None if tbt_ms is None else tbt_ms / 1e3)


def _requests(trace: Path | None, lengths: str | None, count: int, rate: float | None, seed: int,
              interactive: bool) -> list[Request]:
    from dataclasses import replace

    from edge_runtime.offload import traces

    if count < 1:
        raise InvalidRequestError("requests", count, "1 or more")
    if rate is not None and not 0 <= rate < 1e9:
        raise InvalidRequestError("rate", rate, "requests per second, 0 or more")
    if rate and count / rate > traces.MOST_SECONDS:
        raise InvalidRequestError("rate", rate, f"so that {count} requests come within "
                                                f"{traces.MOST_SECONDS:.0e} seconds")
    if lengths is not None:
        if trace is not None:
            raise InvalidRequestError("synthetic", lengths, "given without --trace")
        parts = lengths.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 40 for part in parts):
            raise InvalidRequestError("synthetic", lengths, "prompt and reply tokens, such as 1000,200")
        found = traces.synthetic(count, int(parts[0]), int(parts[1]), rate=rate or None, seed=seed)
    else:
        found = traces.sample_trace(count) if trace is None else traces.read_trace(trace, count)
        if rate is not None:
            found = traces.at_rate(found, rate or None, seed)
    return [replace(one, interactive=True) for one in found] if interactive else found
