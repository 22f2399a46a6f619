"""The bundled model from nothing: `python -m edge_runtime.models.recipes.build --out FILE.gguf --work FOLDER`.

Trains every stage of `stages.STAGES` (or goes on from the work folder's checkpoints), exports, measures, and writes
figures.json and MODEL_CARD.md beside the file. Needs the extra `distill`.
"""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping

from edge_runtime.errors import MissingExtraError

from .config import RecipeConfig, with_steps
from .stages import STAGES


def require_torch() -> None:
    """MissingExtraError where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "distill", "Training a model")


def scaled(stages: Mapping[str, RecipeConfig], share: float) -> dict[str, RecipeConfig]:
    """The stages with that share of their steps, one at least."""
    return {name: with_steps(recipe, max(1, round(recipe.steps * share))) for name, recipe in stages.items()}


def build(out: pathlib.Path, work: pathlib.Path, stages: Mapping[str, RecipeConfig] = STAGES, *, workers: int = 1,
          engine: str = "edge", documents: int = 400, prune: bool = True, hardware: str = "", failures: str = "",
          notes: str = "", compiled: bool | None = None) -> pathlib.Path:
    """Writes the GGUF file `out`, figures.json and MODEL_CARD.md beside it; returns the card's path.

    work: folder of the trainings, gone on with if it has checkpoints. documents: evaluated per split; 0: none, and no
    card. prune: also the curve of size against quality.
    """
    require_torch()
    from .card import write_card
    from .export import export
    from .measure import figures
    from .pruning import curve
    from .train import train

    work.mkdir(parents=True, exist_ok=True)
    for name, recipe in stages.items():
        train(recipe, work / name, resume=True, workers=workers, compiled=compiled)
    last = list(stages)[-1]
    # The measurements export the same file again; a name of its own keeps a half-built one from shipping.
    made = work / out.name
    print(f"{made}: {export(work / last, made):,} bytes")
    card = out.with_name("MODEL_CARD.md")
    if documents:
        if prune:
            curve(work, workers=workers, engine=engine, compiled=compiled)
        found = figures(work, made, documents, engine, hardware or f"{os.cpu_count()} cores")
        out.with_name("figures.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_card(card, stages[last], found, failures, notes)
    partial = out.with_suffix(".partial")
    shutil.copyfile(made, partial)
    os.replace(partial, out)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="GGUF file to write; the card goes beside it")
    parser.add_argument("--work", type=pathlib.Path, help="folder of the trainings (default: a new temporary one)")
    parser.add_argument("--share", type=float, default=1.0, help="share of every stage's steps, for a trial")
    parser.add_argument("--seed", type=int, help="of the first stage: tokenizer, first weights, first data")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="training processes of one thread")
    parser.add_argument("--engine", choices=("edge", "llama.cpp"), default="edge", help="what runs the evaluation")
    parser.add_argument("--documents", type=int, default=400, help="documents evaluated per split")
    parser.add_argument("--no-pruning", action="store_true", help="without the curve of size against quality")
    parser.add_argument("--hardware", default="", help="words for the card")
    parser.add_argument("--failures", type=pathlib.Path, help="Markdown for the card: where it fails")
    parser.add_argument("--notes", type=pathlib.Path, help="Markdown for the card: about this training")
    options = parser.parse_args()
    work = options.work or pathlib.Path(tempfile.mkdtemp(prefix="edge-tiny-"))
    print(f"training folder: {work}")
    stages = dict(STAGES)
    if options.seed is not None:
        stages["base"] = dataclasses.replace(stages["base"], seed=options.seed)
    build(options.out, work, scaled(stages, options.share) if options.share != 1 else stages, workers=options.workers,
          engine=options.engine, documents=options.documents, prune=not options.no_pruning, hardware=options.hardware,
          failures=options.failures.read_text() if options.failures else "",
          notes=options.notes.read_text() if options.notes else "")


if __name__ == "__main__":
    main()
