"""`edge-runtime doctor`: what this machine has, what is missing and how to mend it."""
from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli_common import FAILED, compiling, guarded, open_model, say

GB, MIB = 1e9, 1 << 20
BANDWIDTH_BYTES = 512 << 20

HELP = """What this machine has for Edge Runtime, and what is missing.

Processor, instruction set, threads, memory and its bandwidth, compiled kernels, devices, and optional parts with the
command that installs those that are missing. The exit code is 1 where something keeps models from running.

Examples:

\b
  edge-runtime doctor
  edge-runtime doctor --warm                        compile the kernels of the bundled model now
  edge-runtime doctor --warm -m model.gguf          those of a model of yours
  EDGE_RUNTIME_ISA=avx2 edge-runtime doctor --json
"""


@guarded
def doctor(
    warm: Annotated[bool, typer.Option("--warm", help="Compile kernels ahead of the first use.")] = False,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Whose kernels --warm compiles.",
                                               show_default="the bundled model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Facts as one JSON object on standard output.")] = False,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure the memory bandwidth.")] = True,
) -> None:
    warmed = _warm(model) if warm else None
    facts = collect(measure)
    if warmed is not None:
        facts["warmed"] = warmed
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if facts["problems"]:
        raise typer.Exit(FAILED)


def collect(measure: bool = True) -> dict[str, Any]:
    """All facts, JSON-ready: sizes in bytes, bandwidth in bytes per second. problems: what keeps models from
    running."""
    from edge_runtime import machine
    from edge_runtime.kernels.team import default_threads
    from edge_runtime.models import bundled
    from edge_runtime.offload.plan import memory

    isa, threads, problems = machine.instruction_sets(), default_threads(), []
    physical, logical = machine.cores()
    total, available = memory()
    facts: dict[str, Any] = {
        "processor": machine.processor(), "physical_cores": physical, "logical_cores": logical,
        "isa": dataclasses.asdict(isa), "threads": threads,
        "memory": {"total": total, "available": available},
    }
    if isa.error:
        problems.append(isa.error)
    elif measure:
        from edge_runtime.kernels.bandwidth import measure_bandwidth

        with compiling() as progress:
            rate = measure_bandwidth(threads, min(BANDWIDTH_BYTES, max(available // 8, 16 * MIB)), progress=progress)
        facts["memory"]["bandwidth"] = round(rate)
    facts["kernel_cache"] = dataclasses.asdict(machine.kernel_cache(isa.chosen))
    try:
        file = bundled.path()
        facts["bundled_model"] = {"path": str(file), "nbytes": file.stat().st_size}
    except FileNotFoundError as error:
        facts["bundled_model"] = None
        problems.append(str(error))
    facts["devices"] = machine.devices(isa.chosen, threads)
    facts["extras"] = [{**dataclasses.asdict(extra), "mend": extra.mend if extra.missing else None}
                       for extra in machine.extras()]
    facts["versions"] = machine.versions()
    facts["problems"] = problems
    return facts


def _warm(model: Path | None) -> dict[str, Any]:
    """Loads the model and runs a prompt and a token, so that every kernel it needs is compiled."""
    from edge_runtime.kernels.compile import compiled_kernels

    began = time.perf_counter()
    with open_model(model) as llm:
        llm.generate([0] * min(64, llm.context - 1), max_tokens=1)
    kernels = compiled_kernels()
    say(f"warm: {len(kernels)} kernels compiled now, the others were there" if kernels else "warm: nothing to compile")
    return {"compiled": len(kernels), "seconds": round(time.perf_counter() - began, 2)}


def _print(facts: dict[str, Any]) -> None:
    isa, cache, memory = facts["isa"], facts["kernel_cache"], facts["memory"]
    forced = f" (forced by EDGE_RUNTIME_ISA={isa['forced']})" if isa["forced"] else ""
    rows = [
        ("processor", facts["processor"]),
        ("cores", f"{facts['physical_cores']} physical, {facts['logical_cores']} logical; threads used: "
                  f"{facts['threads']}"),
        ("instruction set", f"{isa['chosen'] or isa['error']}{forced}; runs here: {', '.join(isa['available'])}"),
        ("memory", f"{memory['available'] / GB:.1f} GB available of {memory['total'] / GB:.1f} GB"),
    ]
    if "bandwidth" in memory:
        rows.append(("memory bandwidth", f"{memory['bandwidth'] / GB:.1f} GB/s read by {facts['threads']} threads"))
    compiled = (f"{cache['kernels']} compiled, {cache['nbytes'] / 1e6:.1f} MB" if cache["kernels"] else
                "none compiled yet; edge-runtime doctor --warm does it ahead")
    rows.append(("kernels", f"{compiled}; in {cache['folder']}"
                            + ("" if cache["writable"] else ", which cannot be written: every start compiles anew")))
    bundled = facts["bundled_model"]
    if bundled:
        rows.append(("bundled model", f"{bundled['path']}, {bundled['nbytes'] / 1e6:.1f} MB"))
    rows += [("device" if i == 0 else "", f"{name}: {what}") for i, (name, what) in
             enumerate(facts["devices"].items())]
    for i, extra in enumerate(facts["extras"]):
        state = ", ".join(f"{name} {version}" for name, version in extra["found"].items())
        if extra["missing"]:
            state = f"missing {', '.join(extra['missing'])}: {extra['mend']}"
        rows.append(("extras" if i == 0 else "", f"{extra['name']}: {state}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())))
    rows += [("problem", text) for text in facts["problems"]]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
