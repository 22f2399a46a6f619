"""The bundled model's own recipe by stages, for `edge-runtime distill`: its trainings, and the tools after them."""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_runtime.distillation import require_distill_extra
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.recipes.stages import STAGES as TRAININGS

RECIPES = "edge_runtime.models.recipes"
ALIASES = {"qat": "bundled"}  # the student under the rounding of its file
# Stage -> (module with a main, its option for the output folder or file).
TOOLS: dict[str, tuple[str, str]] = {
    "build": ("build", "--out"),
    "prune": ("pruning", "--work"),
    "export": ("export", "--out"),
    "measure": ("measure", "--out"),
    "evaluate": ("evaluate", ""),
    "divergence": ("divergence", ""),
}
_OPTIONS: dict[str, Any] = {"steps": int, "seed": int, "workers": int, "save_every": (int, float), "eager": bool}


def stage_names() -> tuple[str, ...]:
    return (*TRAININGS, *ALIASES, *TOOLS)


def run_stage(stage: str, options: Mapping[str, Any], *, out: Path, resume: bool = False, check: bool = False) -> None:
    """Runs a stage. A training goes into the folder of its name in `out`, where the stages that it starts from lie too;
    its options are steps, seed, workers, save_every, eager. A tool gets its options as its command line: {"documents":
    100, "no_pruning": true} is `--documents 100 --no-pruning`, and the key "" holds positional arguments.

    InvalidRequestError: no such stage, an option it does not know, a stage before it that has not run, a training that
    is there already without `resume`.
    """
    name = ALIASES.get(stage, stage)
    if name in TRAININGS:
        _train(name, options, out, resume, check)
    elif name in TOOLS:
        _run_tool(name, options, out, check)
    else:
        raise InvalidRequestError("stage", stage, f"distill, or of the bundled model's recipe "
                                                  f"{', '.join(stage_names())}")


def _train(name: str, options: Mapping[str, Any], out: Path, resume: bool, check: bool) -> None:
    for key, value in options.items():
        if key not in _OPTIONS:
            raise InvalidRequestError("config", f"recipe.{key}", f"one of {', '.join('recipe.' + o for o in _OPTIONS)}")
        if not isinstance(value, _OPTIONS[key]) or (isinstance(value, bool) and key != "eager") or value < 0:
            limit = ("true or false" if key == "eager" else "a number from 0 up" if key == "save_every" else
                     "a whole number from 0 up")
            raise InvalidRequestError(f"recipe.{key}", value, limit)
    recipe = TRAININGS[name]
    for before in (recipe.start, recipe.teacher):
        if before and not (out / before).is_dir():
            raise InvalidRequestError("stage", name, f"run after {before!r}, into the same folder: there is no "
                                                     f"{out / before}")
    if (out / name / "checkpoint.safetensors").exists() and not resume:
        raise InvalidRequestError("out", str(out / name), "an empty folder, or add --resume to go on with the training "
                                                          "in it")
    if check:
        return
    require_distill_extra()
    from edge_runtime.models.recipes.config import with_steps
    from edge_runtime.models.recipes.train import train

    if "seed" in options:
        recipe = dataclasses.replace(recipe, seed=options["seed"])
    recipe = with_steps(recipe, options.get("steps", recipe.steps))
    train(recipe, out / name, resume=resume, save_every=float(options.get("save_every", 120.0)),
          workers=options.get("workers", os.cpu_count() or 1), compiled=False if options.get("eager") else None)


def _run_tool(name: str, options: Mapping[str, Any], out: Path, check: bool) -> None:
    module, target = TOOLS[name]
    arguments = command_line(options)
    if target and target not in arguments:
        arguments += [target, str(out)]
    if check:
        return
    require_distill_extra()
    with _arguments(f"{RECIPES}.{module}", arguments):
        try:
            importlib.import_module(f"{RECIPES}.{module}").main()
        except SystemExit as error:  # argparse has said what it refuses
            if error.code:
                raise InvalidRequestError("recipe", dict(options), f"what `python -m {RECIPES}.{module} --help` lists"
                                          ) from None


@contextlib.contextmanager
def _arguments(program: str, words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, [program, *words]
    try:
        yield
    finally:
        sys.argv = before


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line's words."""
    words = [str(value) for value in options.get("", [])]
    for key, value in options.items():
        if key == "" or value is False:
            continue
        words.append("--" + key.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words
