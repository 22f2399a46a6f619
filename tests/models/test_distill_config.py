"""The config of a distillation: what it reads and what it refuses, by name."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.errors import InvalidRequestError, UnsupportedModelError
from edge_runtime.models.recipes.distill_config import DistillConfig, config_from, read_config

MINIMAL = {"teacher": {"model": "t.gguf"}, "text": {"files": ["a.txt"]}}


def with_values(**tables) -> DistillConfig:
    values = {name: {**MINIMAL.get(name, {}), **table} for name, table in {**MINIMAL, **tables}.items()}
    return config_from(values)


def test_defaults_are_fine():
    assert config_from(MINIMAL).checked().training == DistillConfig().training


def test_toml_and_json_say_the_same_and_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('[teacher]\nmodel = "t.gguf"\n[text]\nfiles = "notes"\n'
                                     '[student]\nexit_layers = [1, 2]\n[training]\nlearning_rate = 1\n')
    (tmp_path / "c.json").write_text(json.dumps({
        "teacher": {"model": "t.gguf"}, "text": {"files": ["notes"]}, "student": {"exit_layers": [1, 2]},
        "training": {"learning_rate": 1.0}}))
    found = read_config(tmp_path / "c.toml")
    assert found == read_config(tmp_path / "c.json")
    assert found.teacher.model == str(tmp_path / "t.gguf") and found.text.files == (str(tmp_path / "notes"),)
    assert found.student.exit_layers == (1, 2) and found.student.start == "teacher"
    assert isinstance(found.training.learning_rate, float)


@pytest.mark.parametrize("model, wanted", [("bundled", "bundled"), ("org/model:Q4_0", "org/model:Q4_0"),
                                           ("sub/t.gguf", None)])
def test_names_of_models_are_no_paths(tmp_path, model, wanted):
    (tmp_path / "c.json").write_text(json.dumps({"teacher": {"model": model}}))
    found = read_config(tmp_path / "c.json").teacher.model
    assert found == (wanted or str(tmp_path / model))


@pytest.mark.parametrize("values, words", [
    ({"techer": {}}, "techer.*one of stage, teacher"), ({"training": {"step": 1}}, "training.step.*training.steps"),
    ({"training": {"steps": "1"}}, "training.steps='1': must be a whole number"),
    ({"training": {"steps": True}}, "a whole number"), ({"training": {"steps": 1.5}}, "a whole number"),
    ({"training": 3}, "training=3: must be a table"), ({"student": {"exit_layers": 3}}, "a list"),
    ({"student": {"exit_layers": ["1"]}}, r"exit_layers\[0\]"), ({"recipe": 3}, "recipe"), ([], "config"),
    ({"text": {"special": 1}}, "true or false"), ({"training": {"temperature": "hot"}}, "a number")])
def test_keys_and_types(values, words):
    with pytest.raises(InvalidRequestError, match=words):
        config_from(values)


@pytest.mark.parametrize("tables, words", [
    ({"teacher": {"model": ""}}, "teacher.model"), ({"text": {"files": []}}, "text.files"),
    ({"text": {"held_out": 0.9}}, "held_out=0.9"),
    ({"training": {"temperature": 0.0}}, "temperature=0.0: must be above 0"),
    ({"training": {"temperature": -1.0}}, "temperature"), ({"training": {"temperature": float("nan")}}, "temperature"),
    ({"training": {"kl": 1.1}}, "kl"), ({"training": {"steps": 0}}, "steps"), ({"training": {"context": 1}}, "context"),
    ({"training": {"learning_rate": 0.0}}, "learning_rate"), ({"training": {"precision": "int4"}}, "precision"),
    ({"training": {"layer_dropout": 1.0}}, "layer_dropout"), ({"training": {"save_every": float("nan")}}, "save_every"),
    ({"cache": {"top_k": 0}}, "top_k"), ({"student": {"choose": "luck"}}, "choose"),
    ({"student": {"exit_layers": [2, 1]}}, r"exit_layers=\[2, 1\]: must be ascending"),
    ({"student": {"exit_layers": [0]}}, "exit_layers"), ({"student": {"exit_layers": [1, 1]}}, "exit_layers"),
    ({"student": {"keep": [3, 2]}}, "keep"), ({"student": {"keep": [1, 2], "layers": 3}}, "layers=3"),
    ({"student": {"start": "new", "keep": [1]}}, "keep"), ({"student": {"width": 64}}, "start"),
    ({"student": {"layers": -1}}, "layers"), ({"training": {"threads": 100_000}}, "threads=100000: must be at most"),
    ({"training": {"weight_decay": float("inf")}}, "weight_decay"), ({"training": {"exits": float("inf")}}, "exits")])
def test_values(tables, words):
    with pytest.raises(InvalidRequestError, match=words):
        with_values(**tables).checked()


def test_types_of_files():
    with pytest.raises(UnsupportedModelError, match="Q9"):
        with_values(export={"type": "Q9"}).checked()
    with_values(export={"type": ""}).checked()


def test_broken_files(tmp_path):
    for name, raw, words in (("c.toml", b"[a\n", "TOML"), ("c.json", b"{", "JSON"), ("d.toml", b"\xff", "byte 0")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InvalidRequestError, match=words):
            read_config(tmp_path / name)


def test_the_documented_config_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    (tmp_path / "c.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    found = read_config(tmp_path / "c.toml").checked()
    assert found.teacher.model == "bundled" and found.text.files == (str(tmp_path / "examples"),)
    for number, stage in ((2, "curve"), (3, "student")):
        (tmp_path / "s.toml").write_text(text.split("```toml\n")[number].split("```")[0])
        assert read_config(tmp_path / "s.toml").stage == stage
    for line in text.split("## Every key")[1].split("##")[0].splitlines():  # and every key is known
        for key in line.split("|")[1].split(",") if line.startswith("| `") else []:
            table, _, name = key.strip(" `").rpartition(".")
            assert not table or hasattr(getattr(found, table), name), key
