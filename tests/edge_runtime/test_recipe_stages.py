"""Stages of the bundled model's recipe as `edge-runtime distill` runs them: what may follow what."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("torch")

from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.recipes.checkpoint import save_checkpoint
from edge_runtime.models.recipes.stages import STAGES
from edge_runtime.recipe_stages import command_line, run_stage


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int, int]]:
    """(folder, seed, steps) of each training that was begun."""
    found: list[tuple[str, int, int]] = []

    def train(recipe, folder, **_):
        found.append((folder.name, recipe.seed, recipe.steps))

    monkeypatch.setattr("edge_runtime.models.recipes.train.train", train)
    return found


def held(out: Path, name: str, step: int, **changes: int) -> None:
    """A folder as a training leaves it after `step` steps."""
    (out / name).mkdir(exist_ok=True)
    (out / name / "recipe.json").write_text(dataclasses.replace(STAGES[name], **changes).to_json())
    if step:
        save_checkpoint(out / name / "checkpoint.safetensors", {}, {"step": step, "seconds": 1.0})


def test_a_stage_starts_from_trainings_that_have_ended(tmp_path, trained):
    held(tmp_path, "base", 0)
    with pytest.raises(InvalidRequestError, match="holds none of its steps"):
        run_stage("teacher", {}, out=tmp_path)
    held(tmp_path, "base", 7)
    with pytest.raises(InvalidRequestError, match=f"holds 7 of {STAGES['base'].steps} steps; run that with --resume"):
        run_stage("teacher", {}, out=tmp_path)
    assert not trained
    held(tmp_path, "base", 7, steps=7)
    run_stage("teacher", {"steps": 5}, out=tmp_path)
    assert trained == [("teacher", STAGES["teacher"].seed, 5)]


def test_a_training_goes_on_as_it_began(tmp_path, trained):
    held(tmp_path, "base", 7)
    steps, seed = STAGES["base"].steps, STAGES["base"].seed
    for options, words in (({"steps": steps + 1}, f"recipe.steps={steps + 1}: must be {steps}"),
                           ({"seed": seed + 1}, "recipe.seed"), ({"steps": 0}, "from 1 up")):
        with pytest.raises(InvalidRequestError, match=words):
            run_stage("base", options, out=tmp_path, resume=True)
    assert not trained
    run_stage("base", {"seed": seed}, out=tmp_path, resume=True)
    assert trained == [("base", seed, steps)]


def test_options_of_a_tool_are_words_of_its_command_line():
    assert command_line({"": "a model.gguf", "no_pruning": True, "show": False, "documents": 9}) == [
        "a model.gguf", "--no-pruning", "--documents", "9"]
    assert command_line({"": ["a", 5], "sizes": [1, 2]}) == ["a", "5", "--sizes", "1", "2"]
    with pytest.raises(InvalidRequestError, match="positional"):
        command_line({"": 5})
