"""The bundled model's own recipe by stages, for `edge-runtime distill`: its trainings, and the tools after them."""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.distillation import require_distill_extra
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.recipes.stages import STAGES as TRAININGS

if TYPE_CHECKING:
    from edge_runtime.models.recipes.config import RecipeConfig

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

    InvalidRequestError: no such stage, an option it does not know, a stage before it that has not run to its end, a
    training that is there already, without `resume` or with another seed or other steps.
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
    if options.get("steps") == 0:
        raise InvalidRequestError("recipe.steps", 0, "a whole number from 1 up")
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

    for before in (recipe.start, recipe.teacher):
        if before:
            _ended(out / before, name)
    if "seed" in options:
        recipe = dataclasses.replace(recipe, seed=options["seed"])
    recipe = with_steps(recipe, options.get("steps", recipe.steps))
    _as_it_began(out / name, recipe)
    train(recipe, out / name, resume=resume, save_every=float(options.get("save_every", 120.0)),
          workers=options.get("workers", os.cpu_count() or 1), compiled=False if options.get("eager") else None)


def _ended(folder: Path, stage: str) -> None:
    """InvalidRequestError where the training in `folder`, which `stage` builds on, was stopped before its end."""
    from edge_runtime.models.recipes.checkpoint import load_checkpoint
    from edge_runtime.models.recipes.config import recipe_from_json
    from edge_runtime.models.recipes.train import CHECKPOINT

    path = folder / CHECKPOINT
    done = load_checkpoint(path)[1]["step"] if path.exists() else 0
    steps = recipe_from_json((folder / "recipe.json").read_text()).steps if done else 0
    if not done or done < steps:
        raise InvalidRequestError("stage", stage, f"run after {folder.name!r} has ended: {folder} holds "
                                                  f"{f'{done} of {steps}' if done else 'none of its'} steps; run that "
                                                  "with --resume")


def _as_it_began(folder: Path, recipe: RecipeConfig) -> None:
    """InvalidRequestError where the training in `folder` began with another seed or other steps."""
    from edge_runtime.models.recipes.config import recipe_from_json
    from edge_runtime.models.recipes.train import CHECKPOINT

    if not (folder / CHECKPOINT).exists():
        return
    began = recipe_from_json((folder / "recipe.json").read_text())
    for key in ("seed", "steps"):
        if getattr(recipe, key) != getattr(began, key):
            raise InvalidRequestError(f"recipe.{key}", getattr(recipe, key), f"{getattr(began, key)}, as in the "
                                      f"training that {folder} holds; another one needs another folder")


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
    positional = options.get("", [])
    if not isinstance(positional, str | list | tuple):
        raise InvalidRequestError('recipe.""', positional, "a list of positional arguments")
    words = [positional] if isinstance(positional, str) else list(map(str, positional))
    for key, value in options.items():
        if key == "" or value is False:
            continue
        words.append("--" + key.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words
