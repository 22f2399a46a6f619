"""Every figure of the model card that the recipes measure, as one JSON value: `figures.json` beside the model.

`python -m edge_runtime.models.recipes.measure --work FOLDER --model FILE.gguf --out figures.json`. What is measured is
kept in the work folder and not measured again.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

from .config import recipe_from_json
from .divergence import folder_predictor, held_out_kl, tokenizer_of
from .evaluate import evaluate, generator, perplexity
from .export import export
from .stages import STAGES
from .train import importance, load_network

DIVERGENCE_DOCUMENTS = 100
RECIPES = "python -m edge_runtime.models.recipes"
# What the model must reach, and what it should.
LIMITS = {"student vs control KL": ("15 % lower", "30 % lower"), "key facts": ("90 %", "97 %"),
          "exact answers": ("85 %", "95 %"), "INT4 (QAT) vs float perplexity": ("+ 2 %", "+ 1 %")}


def kept(path: pathlib.Path, make: Callable[[], Any]) -> Any:
    """What the file holds, made and written where it is missing."""
    if not path.exists():
        value = make()
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False))
        os.replace(unfinished, path)
    return json.loads(path.read_text())


def training_figures(folder: pathlib.Path) -> dict[str, float]:
    """Shape, seed, and steps, tokens, losses, speed and minutes of the log in a training folder."""
    recipe = recipe_from_json((folder / "recipe.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speeds = sorted(line["tokens_per_second"] for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    last = [line["loss"] for line in lines[-50:]]
    return {"parameters": recipe.network.parameters, "seed": recipe.seed, "steps": len(lines),
            "tokens": tokens, "first_loss": lines[0]["loss"], "last_loss": sum(last) / len(last),
            "speed": speeds[len(speeds) // 2], "mean_speed": tokens / lines[-1]["seconds"],
            "minutes": lines[-1]["seconds"] / 60}


def divergences(work: pathlib.Path, documents: int) -> dict[str, Any]:
    """Student and control against the teacher, float weights."""
    found = held_out_kl({name: folder_predictor(work / name) for name in ("student", "control")},
                        folder_predictor(work / "teacher"), tokenizer_of(work / "teacher"), documents)
    lower = {field: 1 - getattr(found["student"], field) / getattr(found["control"], field)
             for field in ("all_text", "answers")}
    return {**{name: vars(value) for name, value in found.items()}, "lower_by": lower, "documents": documents,
            "command": f"{RECIPES}.divergence --teacher teacher --student student --control control "
                       f"--documents {documents}"}


def rounding_table(work: pathlib.Path, model: pathlib.Path) -> dict[str, Any]:
    """Perplexities of the float student, of its roundings without training, and of the file."""
    config, tokenizer, network = load_network(work / "student")
    weights = importance(network, config, tokenizer)
    student = work / "student"
    ways: dict[str, dict[str, Any]] = {
        "float": {"type_name": "F32", "head_type": "F32"}, "plain rounding": {"method": "plain"},
        "search": {"method": "search"}, "importance-weighted search": {"method": "search", "importance": weights}}
    table = {}
    for name, options in ways.items():
        path = work / f"student-{name.replace(' ', '-')}.gguf"
        export(student, path, **options)
        table[name] = perplexity(path)
    table["trained for it (the file)"] = perplexity(model)
    return table


def exit_table(work: pathlib.Path, folder: str, exits: tuple[int, ...], documents: int, engine: str) -> dict[str, Any]:
    """By exit: agreement with the full model's most likely token on reference answers, and the quality of a model that
    always leaves there."""
    full, early = folder_predictor(work / folder), {e: folder_predictor(work / folder, e) for e in exits}
    tokenizer = tokenizer_of(work / folder)
    teacher_forced = held_out_kl({str(e): predict for e, predict in early.items()}, full, tokenizer, 40)
    table = {}
    for layer in exits:
        path = work / f"exit-{layer}.gguf"
        export(work / folder, path, layers=layer)
        score = evaluate(generator(engine, path, os.cpu_count() or 1), "held_out", documents, show=0)
        table[str(layer)] = {"agreement": teacher_forced[str(layer)].answers_agreement,
                             "divergence": teacher_forced[str(layer)].answers, "facts_kept": score.facts_kept,
                             "answers_exact": score.answers_exact, **perplexity(path, count=30)}
    return table


def figures(work: pathlib.Path, model: pathlib.Path, documents: int = 400, engine: str = "edge",
            hardware: str = "") -> dict[str, Any]:
    """All figures; see the module."""
    config = load_network(work / model_stage(work))[0]

    def score(path: pathlib.Path, split: str, show: int = 0) -> dict[str, Any]:
        # The stages that do not ship are judged by half as many.
        count = documents if path == model else -(-documents // 2)
        return dataclasses.asdict(evaluate(generator(engine, path, os.cpu_count() or 1), split, count, show=show))

    def stage_score(stage: str) -> dict[str, Any]:
        path = work / f"{stage}-q8_0.gguf"  # loses next to nothing and is read four times as fast as floats
        export(work / stage, path, "Q8_0", "Q8_0")
        return score(path, "held_out")

    quality = {
        "held_out": kept(work / "score-held_out.json", lambda: score(model, "held_out", 8)),
        "novel": kept(work / "score-novel.json", lambda: score(model, "novel")),
        **{stage: kept(work / f"score-{stage}.json", partial(stage_score, stage))
           for stage in ("student", "control", "teacher") if (work / stage).exists()}}
    kl = kept(work / "divergence.json", lambda: divergences(work, min(documents, DIVERGENCE_DOCUMENTS)))
    rounding = kept(work / "rounding.json", lambda: rounding_table(work, model))
    exits = kept(work / "exits.json", lambda: exit_table(work, model_stage(work), config.exits, min(documents, 100),
                                                      engine))
    loss = rounding["trained for it (the file)"]["all_text"] / rounding["float"]["all_text"] - 1
    main = quality["held_out"]
    evaluation = f"{RECIPES}.evaluate {model.name} --documents {main['documents']} --perplexity"
    rows = {
        "student vs control KL": (f"{kl['lower_by']['all_text']:.1%} lower", kl["lower_by"]["all_text"], kl["command"]),
        "key facts": (f"{main['facts_kept']:.1%}", main["facts_kept"], evaluation),
        "exact answers": (f"{main['answers_exact']:.1%}", main["answers_exact"], evaluation),
        "INT4 (QAT) vs float perplexity": (f"{loss:+.2%}", loss, f"{RECIPES}.measure --work WORK --model {model.name}")}
    pruning = work / "pruning.json"
    return {
        "rows": [{"what": what, "shown": shown, "value": value, "must": LIMITS[what][0], "goal": LIMITS[what][1],
                  "command": command} for what, (shown, value, command) in rows.items()],
        "hardware": hardware, "file": model.name, "bytes": model.stat().st_size,
        "parameters": config.network.parameters, "exit_layers": list(config.exits),
        "training": {name: training_figures(work / name) for name in STAGES if (work / name / "log.jsonl").exists()},
        "divergence": kl, "quality": quality, "perplexity": rounding, "exits": exits,
        "pruning": json.loads(pruning.read_text()) if pruning.exists() else []}


def model_stage(work: pathlib.Path) -> str:
    """The stage that the file is exported from: the last one."""
    return next(name for name in reversed(STAGES) if (work / name).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of the trainings")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the exported file")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--documents", type=int, default=400, help="documents evaluated per split")
    parser.add_argument("--engine", choices=("edge", "llama.cpp"), default="edge")
    parser.add_argument("--hardware", default="", help="words for the card")
    options = parser.parse_args()
    found = figures(options.work, options.model, options.documents, options.engine, options.hardware)
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
