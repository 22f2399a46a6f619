"""The CPU engine beside its peers: every figure that is promised, as must, goal and what was measured.

    python benchmarks/cpu_engine.py --models ~/models-bench --json figures.json     (about 20 minutes on two cores)
    python benchmarks/cpu_engine.py --quick                                         (under five)

Models have random weights in the shapes of real ones (`shapes.py`); they are kept in --models, else made anew.
Peers: llama-cpp-python, openvino and onnx (pip install 'edge-runtime[bench]'); other builds of llama_cpp are tried
too where EDGE_RUNTIME_PEER_PATH names their folders, and the fastest that works counts.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matrix_product
import numpy as np
import quality
import whole_process
from shapes import cached

from edge_runtime.apps.bench import BenchPlan, run_bench
from edge_runtime.apps.bench_client import Peers, Worker, open_peers
from edge_runtime.models import bundled

TEXTS = Path(__file__).parent.parent / "examples"


@dataclass(frozen=True)
class Row:
    """value: measured, None where a peer is missing; must, goal: promised; better: "higher" or "lower"."""

    name: str
    value: float | None
    must: float
    goal: float
    better: str = "higher"
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        sign = 1 if self.better == "higher" else -1
        if sign * self.value >= sign * self.goal:
            return "goal"
        return "must" if sign * self.value >= sign * self.must else "MISSED"


@dataclass(frozen=True)
class Run:
    """What this measurement is: quick: fewer runs and shorter; shape: of the large model; small: of the small one."""

    models: Path
    threads: int
    quick: bool
    shape: str = "llama1b"
    small: str = "qwen05b"

    @property
    def repeat(self) -> int:
        return 1 if self.quick else 3

    def model(self, shape: str, kind: str) -> Path:
        return cached(shape, kind, self.models)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ratios(path: Path, plan: BenchPlan, names: dict[str, tuple[str, float, float]]) -> Iterator[Row]:
    """Rows of a bench: names maps its names to (ours, must, goal)."""
    rows = {row["name"]: row for row in run_bench(path, plan, say)}
    for name, (title, must, goal) in names.items():
        row = rows[name]
        detail = f"{row['value']:.1f} tokens/s"
        if row["llama_cpp"] is not None:
            detail += f", llama.cpp {row['llama_cpp']:.1f}"
        for key, label in (("share_of_bandwidth", "of the measured bandwidth"), ("share_of_peak", "of the peak")):
            if key in row:
                detail += f", {row[key]:.0%} {label}"
        detail += f" ({row['peak']})" if "peak" in row else ""
        yield Row(title, row["ratio"], must, goal, detail="; ".join(filter(None, (detail, row.get("detail", "")))))


def speed(run: Run) -> Iterator[Row]:
    decode = 32 if run.quick else 64
    common = dict(repeat=run.repeat, threads=run.threads, peer=True, decode=decode)
    yield from ratios(run.model(run.shape, "Q4_0"), BenchPlan(
        prefill=(512, 2048), depth=(0, 4096), batch=(16,), batch_depth=64 if run.quick else 256, **common), {
        "prefill_512": (f"{run.shape} Q4_0 prefill 512, x llama.cpp", 2.0, 3.0),
        "prefill_2048": (f"{run.shape} Q4_0 prefill 2048, x llama.cpp", 2.0, 3.0),
        "decode_at_0": (f"{run.shape} Q4_0 decode at 0, x llama.cpp", 1.3, 1.7),
        "decode_at_4096": (f"{run.shape} Q4_0 decode at 4096, x llama.cpp", 1.8, 3.0),
        "batch_16": (f"{run.shape} Q4_0 batch 16 decode, x llama.cpp", 2.0, 3.5)})
    plan = BenchPlan(prefill=(512,), depth=(0,), **common)
    yield from ratios(run.model(run.shape, "Q4_K_M"), plan, {
        "prefill_512": (f"{run.shape} Q4_K_M prefill 512, x llama.cpp", 1.8, 2.8),
        "decode_at_0": (f"{run.shape} Q4_K_M decode at 0, x llama.cpp", 1.2, 1.6)})
    yield from ratios(run.model(run.small, "Q4_0"), plan, {
        "prefill_512": (f"{run.small} Q4_0 prefill 512, x llama.cpp", 1.5, 2.5),
        "decode_at_0": (f"{run.small} Q4_0 decode at 0, x llama.cpp", 1.2, 1.5)})


def start(run: Run) -> Iterator[Row]:
    found = whole_process.warm_start(run.model(run.shape, "Q4_0"), run.threads, 3 if run.quick else 7)
    ours, peer = found["ours"], found["peer"]
    detail = f"{ours:.2f} s" + (f", llama-cpp-python {peer:.2f} s" if peer else "")
    yield Row("warm start to first token, x llama-cpp-python's time", ours / peer if peer else None, 4.0, 1.5, "lower",
              "; ".join(filter(None, (detail, found["notes"]))))


def product(run: Run) -> Iterator[Row]:
    rows, inputs, outputs = (256, 2048, 8192) if run.shape == "llama1b" else (64, 256, 768)
    found = matrix_product.measure(rows, inputs, outputs, run.threads, 1.5 if run.quick else 6.0)
    ours, peer = found["ours"], found["openvino"]
    detail = f"{ours / 1e12:.2f} TOPS" + (f", OpenVINO {peer / 1e12:.2f}" if peer else "")
    yield Row(f"matrix product {rows} x {inputs} x {outputs}, block 32, x OpenVINO MatMulNBits",
              ours / peer if peer else None, 1.1, 1.5, detail=f"{detail}; {found['detail']}")


def memory(run: Run) -> Iterator[Row]:
    beyond, detail = whole_process.peak_beyond_file(run.model(run.shape, "Q4_0"), run.threads)
    yield Row(f"{run.shape} Q4_0 peak RSS beyond file + KV, MB", beyond / 1e6, 450, 200, "lower", detail)


def distributions(run: Run) -> Iterator[Row]:
    few = np.random.default_rng(5).integers(300, 2000, 8 if run.quick else 16).tolist()
    cases: list[tuple[str, Path, list[int]]] = [(f"{run.shape} Q4_0", run.model(run.shape, "Q4_0"), few)]
    try:
        path = bundled.path()
        cases.append(("bundled model", path, bundled_tokens(path, 96 if run.quick else 384)))
    except FileNotFoundError as error:
        say(str(error))
    for name, path, ids in cases:
        ours, peers = Worker("ours"), Peers()
        try:
            ours.call("load", path=str(path), threads=run.threads, tokens=len(ids), kv="int8")
            peers = open_peers(path, run.threads, max(256, len(ids)), probe_prompt=16, say=say)
            found = quality.measure(path, ids, ours, peers.worker("decode"))
            note = "; ".join(peers.notes)
        finally:
            ours.close()
            peers.close()
        detail = ", ".join(f"{key} {value:.2e}" for key, value in found.kl.items())
        yield Row(f"{name} KL from the float reference, x llama.cpp's", found.ratio(), 1.25, 1.0, "lower",
                  f"{detail}; {found.positions} positions" + (f"; {note}" if note else ""))
        share = "" if found.agreement is None else f"{found.agreement:.1%} the same"
        yield Row(f"{name} greedy tokens as llama.cpp's, or within both errors", found.explained, 1.0, 1.0,
                  detail=f"{share}; {found.positions} positions")


def bundled_tokens(path: Path, count: int) -> list[int]:
    """The first `count` tokens of the example documents."""
    from edge_runtime.models.gguf_file import GGUFFile
    from edge_runtime.tokenizer import Tokenizer

    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(TEXTS.rglob("*.txt")))
    with GGUFFile(path) as file:
        return Tokenizer.from_metadata(file.metadata).encode(text)[:count]


PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "speed": speed, "start": start, "product": product, "memory": memory, "quality": distributions}


def table(rows: list[Row]) -> str:
    lines = ["| what | measured | must | goal | | detail |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.3g}" if row.value < 100 else f"{row.value:.0f}"
        lines.append(f"| {row.name} | {value} | {row.must:g} | {row.goal:g} | {row.verdict} | {row.detail} |")
    return "\n".join(lines)


def measure(run: Run, parts: list[str]) -> list[Row]:
    rows = []
    for part in parts:
        began = time.perf_counter()
        for row in PARTS[part](run):
            say(f"{row.name}: {row.value} ({row.verdict}) {row.detail}")
            rows.append(row)
        say(f"-- {part}: {time.perf_counter() - began:.0f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder that keeps the model files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--shape", default="llama1b", help="of the large model (shapes.py)")
    parser.add_argument("--small", default="qwen05b", help="of the small model")
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="write the rows as JSON, - or nothing: "
                                                                             "to standard output")
    a = parser.parse_args()
    parts = a.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: one of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Run(a.models or Path(scratch), a.threads, a.quick, a.shape, a.small), parts)
    found: list[dict[str, Any]] = [asdict(row) for row in rows]
    if a.json and str(a.json) != "-":
        a.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if a.json and str(a.json) == "-" else table(rows))


if __name__ == "__main__":
    main()
