"""Size against quality: the student with layers, feed-forward channels or heads taken away, and a short recovery.

`python -m edge_runtime.models.recipes.pruning --work FOLDER` writes pruning.json there, point by point; a point that is
there is not made again.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import torch

from .batches import make_batch
from .bpe import encode_turns
from .checkpoint import save_checkpoint
from .config import RecipeConfig
from .divergence import conversation
from .evaluate import evaluate, generator
from .export import export
from .network import Network
from .prune import keep_layers, measure_importance, most_important, perplexity, shrink
from .stages import STUDENT
from .train import CHECKPOINT, load_network, train

# (layers, kv heads, feed-forward channels), 0: all.
SIZES = ((8, 0, 0), (6, 0, 0), (0, 0, 512), (0, 1, 0))
RECOVERY = dataclasses.replace(STUDENT, seed=3005, steps=10, teacher="", exits=(), layer_dropout=0.0,
                               rate_points=((0, 0.1), (2, 0.3), (10, 0.0)))
CALIBRATION_BATCHES, HELD_OUT = 4, 40


def smaller(network: Network, rows: list[torch.Tensor], size: tuple[int, int, int]) -> Network:
    """The parts of the network that calibration rows need most."""
    layers, kv_heads, ffn = size
    if layers:
        network = keep_layers(network, most_important(measure_importance(network, rows).layers, layers))
    if kv_heads or ffn:
        network = shrink(network, measure_importance(network, rows), kv_heads=kv_heads, ffn=ffn)
    return network


def point(work: pathlib.Path, source: str, size: tuple[int, int, int], recovery: RecipeConfig, *, workers: int = 1,
          documents: int = 100, engine: str = "edge", compiled: bool | None = None) -> dict[str, Any]:
    """Prunes the stage `source`, recovers it, and measures both: perplexity of held-out conversations in float, and
    what the recovered one keeps as a Q4_0 file."""
    config, tokenizer, network = load_network(work / source)
    batches = [make_batch(config, tokenizer, number).tokens[:, :-1] for number in range(CALIBRATION_BATCHES)]
    cut = smaller(network, [torch.from_numpy(row) for batch in batches for row in batch], size)
    name = "pruned-" + "-".join(map(str, size))
    start = work / f"{name}-start"
    start.mkdir(exist_ok=True)
    recipe = dataclasses.replace(recovery, network=cut.config, start=start.name)
    (start / "recipe.json").write_text(dataclasses.replace(recipe, start="").to_json())
    shutil.copyfile(work / source / "tokenizer.json", start / "tokenizer.json")
    save_checkpoint(start / CHECKPOINT, {f"weights.{n}": v for n, v in cut.state_dict().items()}, {"step": 0})
    held_out = [torch.tensor(encode_turns(tokenizer, conversation("held_out", i))[0]) for i in range(HELD_OUT)]
    recovered = train(recipe, work / name, resume=True, workers=workers, compiled=compiled) if recipe.steps else cut
    path = work / f"{name}.gguf"
    size_bytes = export(work / name if recipe.steps else start, path)
    score = evaluate(generator(engine, path, os.cpu_count() or 1), "held_out", documents, show=0)
    shape = cut.config
    return {"layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads, "ffn": shape.ffn,
            "parameters": shape.parameters, "bytes": size_bytes, "perplexity": perplexity(cut, held_out),
            "recovered": perplexity(recovered, held_out), "steps": recipe.steps,
            "facts_kept": score.facts_kept, "answers_exact": score.answers_exact}


def curve(work: pathlib.Path, source: str = "student", sizes: tuple[tuple[int, int, int], ...] = SIZES,
          recovery: RecipeConfig = RECOVERY, **options: Any) -> list[dict[str, Any]]:
    """All points, the whole student first; kept in pruning.json as they come."""
    path = work / "pruning.json"
    points: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for number, size in enumerate(((0, 0, 0), *sizes)):
        if number < len(points):
            continue
        steps = recovery if any(size) else dataclasses.replace(recovery, steps=0)
        points.append(point(work, source, size, steps, **options))
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(points, indent=1))
        os.replace(partial, path)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of the trainings")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--documents", type=int, default=100)
    options = parser.parse_args()
    for found in curve(options.work, workers=options.workers, documents=options.documents):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
