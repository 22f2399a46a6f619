"""Early exit in figures: every one that is promised, as must, goal and what was measured.

    python benchmarks/early_exit.py --models ~/models-bench --json figures.json     (about 15 minutes on two cores)
    python benchmarks/early_exit.py --quick                                         (under five)

The bundled model speaks on documents that neither its training nor its calibration saw. What needs the teacher, the
control or the float student is taken from figures.json beside the model, and the detail says so. Where the bundled
model is too small for the engine around it, a random-weight model in a real shape shows the speed (`shapes.py`; kept
in --models, else made anew). Peer: llama-cpp-python (pip install 'edge-runtime[bench]').
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import quality
from cpu_engine import Row, say, table
from exit_quality import calibrated, recorded, recorded_value
from exit_speed import FULL, device_ratio, in_turns, ratio, same_tokens
from shapes import SHAPES, Shape, cached

from edge_runtime import calibration_corpus
from edge_runtime.apps.bench_client import Peers, Worker, open_peers
from edge_runtime.early_exit import EarlyExit
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.llm import LLM
from edge_runtime.models import bundled

RISK = 0.01


@dataclass(frozen=True)
class Run:
    """What this measurement is: quick: fewer runs and shorter; shape: of the large model; exits: bundled model's, where
    its file names none."""

    models: Path
    threads: int
    quick: bool
    shape: str = "llama1b"
    exits: tuple[int, ...] | None = None

    @property
    def repeat(self) -> int:
        return 3 if self.quick else 5

    def bundled(self) -> LLM:
        return LLM(threads=self.threads, exit_layers=self.exits)


def training(run: Run) -> Iterator[Row]:
    """Four rows of the recipes. Summaries and answers are made anew; the others need what does not ship."""
    from edge_runtime.models.recipes.evaluate import evaluate, perplexity

    figures = recorded()
    source = "recorded by the recipes in figures.json" if figures else "no figures.json beside the model"
    value = recorded_value(figures, "student vs control KL")
    yield Row("student vs same-size control: held-out KL to the teacher, share lower", value, 0.15, 0.3, detail=source)
    count = 60 if run.quick else 240
    with run.bundled() as llm:
        score = evaluate(lambda prompts, most: [r.text for r in llm.generate(
            list(prompts), max_tokens=most, temperature=0.0, early_exit=False)], "held_out", count, show=0)
    on = f"measured now, {score.documents} held-out documents"
    yield Row("key facts kept in summaries of held-out documents", score.facts_kept, 0.9, 0.97,
              detail=f"{on}, {score.facts} facts")
    yield Row("exact answers to fact questions", score.answers_exact, 0.85, 0.95,
              detail=f"{on}; unanswerable ones refused: {score.unknown_right:.1%}")
    loss, detail = recorded_value(figures, "INT4 (QAT) vs float perplexity"), source
    plain = figures.get("perplexity", {}).get("float", {}).get("all_text")
    if plain and not run.quick:
        own = perplexity(bundled.path())["all_text"]
        loss, detail = own / plain - 1, f"the file's perplexity {own:.4f} measured now, the float student's " \
                                        f"{plain:.4f} recorded"
    yield Row("INT4 (QAT) vs float student: perplexity, share more", loss, 0.02, 0.01, "lower", detail)


def verify(run: Run) -> Iterator[Row]:
    name = "verify decode, greedy, bundled model, x full model"
    with run.bundled() as llm:
        if not llm.exit_layers:
            yield Row(name, None, 1.3, 1.8, detail="the bundled model names no exits; --exits tries some")
            return
        prompts = [llm._chat_ids(text).tolist() for text in calibration_corpus.prompts(
            4 if run.quick else 12, calibration_corpus.JUDGED_SEED)]
        ways: dict[str, EarlyExit | None] = {FULL: None, "verify": EarlyExit("verify")}
        ways |= {f"drafts after {layer}": EarlyExit("verify", layer=layer) for layer in llm.exit_layers}
        found = in_turns(llm, prompts, ways, 192, run.repeat)
        layers = llm.exit_layers if not run.quick else llm.exit_layers[:1]
        by_device = {layer: device_ratio(llm, prompts[0], layer, 64, run.repeat) for layer in layers}
    same = all(same_tokens(found, way) for way in ways if way != FULL) and all(d[2] for d in by_device.values())
    drafts = ", ".join(_drafts_said(layer, ratio(found, f"drafts after {layer}"),
                                    found[f"drafts after {layer}"].acceptance, by_device.get(layer))
                       for layer in llm.exit_layers)
    detail = f"{found['verify'].rate:.0f} tokens/s, full {found[FULL].rate:.0f}; " \
             f"{'same tokens' if same else 'TOKENS DIFFER'} in {len(prompts)} replies; drafts {drafts}"
    yield Row(name, ratio(found, "verify") if same else 0.0, 1.3, 1.8, detail=detail)


def _drafts_said(layer: int, times: float, right: float, alone: tuple[float, int, bool] | None) -> str:
    device = "" if alone is None else f", device alone {alone[0]:.2f} with {alone[1]} at a time"
    return f"after {layer} {times:.2f} (right {right:.0%}{device})"


def exits(run: Run) -> Iterator[Row]:
    name = f"calibrated exit at {RISK:.0%} disagreement: layers per token, share less"
    with run.bundled() as llm:
        if not llm.exit_layers:
            yield Row(name, None, 0.25, 0.4, detail="the bundled model names no exits; --exits tries some")
            return
        try:
            held = calibrated(llm, RISK, 800 if run.quick else 3000, 60 if run.quick else 400)
        except EdgeRuntimeError as error:
            yield Row(name, 0.0, 0.25, 0.4, detail=str(error))
            return
        own, seen = held.calibration, held.measured
        prompts = [llm._chat_ids(text).tolist() for text in calibration_corpus.prompts(
            4 if run.quick else 12, calibration_corpus.JUDGED_SEED)]
        early = EarlyExit("recompute", own.criterion, own.thresholds)
        found = in_turns(llm, prompts, {FULL: None, "exit": early}, 192, run.repeat)
    yield Row(name, 1 - seen.layers_per_token / own.layers, 0.25, 0.4, detail=(
        f"{seen.layers_per_token:.2f} of {own.layers} layers, {seen.risk:.2%} of a reply's tokens differ "
        f"({seen.tokens:.2%} of all), on documents that calibration did not see; {own.criterion}, {held.how}; replies "
        f"by themselves: {found['exit'].layers_per_token:.2f} layers, {ratio(found, 'exit'):.2f} x full tokens/s"))


def peer(run: Run) -> Iterator[Row]:
    name = "llama.cpp on the same file: greedy tokens equal, or within both errors"
    path = bundled.path()
    with run.bundled() as llm:
        ids: list[int] = []
        for text in calibration_corpus.prompts(4 if run.quick else 12, calibration_corpus.JUDGED_SEED):
            prompt = llm._chat_ids(text)
            ids += [*prompt.tolist(), *llm.generate(prompt, max_tokens=192, temperature=0.0).token_ids]
        ids = ids[:min(llm.context, 256 if run.quick else 1024)]
    ours, peers = Worker("ours"), Peers()
    try:
        ours.call("load", path=str(path), threads=run.threads, tokens=len(ids), kv="int8")
        peers = open_peers(path, run.threads, max(256, len(ids)), probe_prompt=16, say=say)
        found = quality.measure(path, ids, ours, peers.worker("decode"))
        notes = "; ".join(peers.notes)
    finally:
        ours.close()
        peers.close()
    share = "" if found.agreement is None else f"{found.agreement:.2%} the same of {found.positions} positions"
    yield Row(name, found.explained, 1.0, 1.0, detail="; ".join(filter(None, (share, notes))) or
              "llama-cpp-python is missing: pip install 'edge-runtime[bench]'")


def large(run: Run) -> Iterator[Row]:
    """A real shape, where a layer costs what it reads."""
    shape = SHAPES[run.shape]
    low, half = shape.layers // 4, shape.layers // 2
    prompt = np.random.default_rng(1).integers(300, shape.vocab, 64).tolist()
    tokens = 32 if run.quick else 64
    file = cached(run.shape, "Q4_0", run.models, idle_from=low)
    with LLM(file, threads=run.threads, context=512, exit_layers=(low, half)) as llm:
        ways = {FULL: None, "low": EarlyExit("propagate", "layer", layer=low),
                "half": EarlyExit("propagate", "layer", layer=half),
                # The head of random weights is never sure: only the check decides.
                "verify": EarlyExit("verify", layer=low, thresholds={low: 1e-6}, max_draft=12)}
        found = in_turns(llm, [prompt], ways, tokens, run.repeat, ignore_eos=True)
        alone = device_ratio(llm, prompt, low, tokens, 1 if run.quick else run.repeat, (4, 8) if run.quick else
                             (4, 8, 12))
    for name, layer in (("half", half), ("low", low)):
        best = weights(shape, shape.layers) / (weights(shape, layer) + copied(shape, layer))
        yield Row(f"{run.shape} Q4_0, every token leaves after layer {layer} of {shape.layers}, x full model",
                  ratio(found, name), round(0.8 * best, 2), round(0.92 * best, 2), detail=(
                      f"{found[name].rate:.1f} tokens/s, full {found[FULL].rate:.1f}; weights read allow {best:.2f}; "
                      "random weights, speed only"))
    same, drafts = same_tokens(found, "verify") and alone[2], found["verify"]
    yield Row(f"{run.shape} Q4_0, verify where layers above {low} change nothing, x full model",
              ratio(found, "verify") if same else 0.0, 1.3, 1.8, detail=(
                  f"{drafts.rate:.1f} tokens/s, full {found[FULL].rate:.1f}; "
                  f"{'same tokens' if same else 'TOKENS DIFFER'}, drafts right {drafts.acceptance:.0%}; device alone "
                  f"{alone[0]:.2f} with {alone[1]} drafts"))


def weights(shape: Shape, layers: int) -> int:
    """Weights that a token reads in so many layers and the head."""
    attention = shape.width * shape.head_size * (2 * shape.heads + 2 * shape.kv_heads)
    return layers * (attention + 3 * shape.width * shape.ffn) + shape.vocab * shape.width


def copied(shape: Shape, layer: int) -> int:
    """Weights of K and V in the layers above, which a state that is copied upward passes."""
    return (shape.layers - layer) * 2 * shape.width * shape.kv_heads * shape.head_size


PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "training": training, "verify": verify, "exits": exits, "peer": peer, "large": large}


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
    parser.add_argument("--shape", default="llama1b", choices=SHAPES, help="of the large model (shapes.py)")
    parser.add_argument("--exits", help="exit layers of the bundled model, such as 2,4, instead of its own")
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="write the rows as JSON, - or nothing: "
                                                                             "to standard output")
    a = parser.parse_args()
    parts = a.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: one of {', '.join(PARTS)}")
    layers = tuple(int(layer) for layer in a.exits.split(",")) if a.exits else None
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these exits were never measured: they are now
        rows = measure(Run(a.models or Path(scratch), a.threads, a.quick, a.shape, layers), parts)
    found: list[dict[str, Any]] = [asdict(row) for row in rows]
    if a.json and str(a.json) != "-":
        a.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if a.json and str(a.json) == "-" else table(rows), file=sys.stdout)


if __name__ == "__main__":
    main()
