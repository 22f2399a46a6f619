"""`edge-runtime distill` and `quantize FOLDER` as a user runs them."""
from __future__ import annotations

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from edge_runtime import LLM
from edge_runtime.cli import app
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from tests.gguf_factory import write_model
from tests.hf_factory import hf_config, write_hf_folder


class Done:
    """What a command of this process left behind."""

    def __init__(self, *arguments: object):
        runner = CliRunner(env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})
        result = runner.invoke(app, list(map(str, arguments)))
        self.returncode, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception


cli = Done


def assert_clear(done: Done, code: int, *words: str) -> None:
    """One line that names what is wrong."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr


@pytest.fixture
def config(tmp_path):
    write_model(tmp_path / "teacher.gguf", types="Q8_0", layers=3, vocab=320)
    (tmp_path / "text.md").write_text("the ship left the harbour at nine. " * 60)
    path = tmp_path / "distill.json"
    path.write_text(json.dumps({
        "teacher": {"model": "teacher.gguf"}, "text": {"files": ["text.md"]}, "cache": {"top_k": 8},
        "student": {"layers": 2, "exit_layers": [1]},
        "training": {"steps": 3, "context": 64, "rows_per_step": 2, "threads": 1}}))
    return path


def test_help_and_check(config):
    done = cli("distill", "--help")
    assert done.returncode == 0 and "Examples:" in done.stdout and "--resume" in done.stdout
    done = cli("distill", "--config", config, "--check")
    assert done.returncode == 0 and "nothing wrong" in done.stderr


def test_distill_writes_a_student_that_runs(config, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    done = cli("distill", "-c", config, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "KL to the teacher" in done.stderr and "40 bytes a token" in done.stderr and "after layer 1" in done.stderr
    with LLM(out / "student-q4_0.gguf", threads=1) as llm:
        assert llm.generate("the ship", max_tokens=3).stats.completion_tokens >= 1
    assert_clear(cli("distill", "-c", config, "-o", out), 2, "--resume")
    assert cli("distill", "-c", config, "-o", out, "--resume").returncode == 0


def test_what_is_wrong_is_one_line(config, tmp_path):
    assert_clear(cli("distill", "-c", tmp_path / "none.toml"), 2, "exists")
    values = json.loads(config.read_text())
    for change, words in (({"training": {"temperature": 0.0}}, "temperature"), ({"x": 1}, "x"),
                          ({"stage": "dance"}, "teacher"), ({"recipe": {"a": 1}}, "recipe"),
                          ({"stage": "base"}, 'absent where stage is "base"')):
        config.write_text(json.dumps({**values, **change}))
        assert_clear(cli("distill", "-c", config, "-o", tmp_path / "out"), 2, words)
    for change, words in (({"stage": "student"}, "stem"), ({"stage": "base", "recipe": {"stepz": 3}}, "recipe.steps"),
                          ({"stage": "base", "recipe": {"seed": 1.5}}, "whole number"),
                          ({"stage": "base", "training": {"steps": 9}}, "'training'")):
        config.write_text(json.dumps(change))
        assert_clear(cli("distill", "-c", config, "-o", tmp_path / "out"), 2, words)
    config.write_text("[" * 100_000)
    assert_clear(cli("distill", "-c", config, "-o", tmp_path / "out"), 2, "JSON")
    assert not (tmp_path / "out").exists()


def test_the_curve_is_a_table(config, tmp_path):
    pytest.importorskip("torch")
    values = json.loads(config.read_text()) | {"stage": "curve", "curve": {"sizes": [[0, 0, 0], [1, 1, 64]]}}
    config.write_text(json.dumps(values))
    done = cli("distill", "-c", config, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    head, whole, small = [line.split("\t") for line in done.stdout.splitlines()]
    assert head[:3] == ["layers", "kv_heads", "ffn"]
    assert whole[:3] == ["3", "2", "128"] and small[:3] == ["1", "1", "64"]
    assert int(small[4]) < int(whole[4]) and small[-1] == "-"


def test_a_missing_extra_is_named(config, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    assert_clear(cli("distill", "-c", config, "-o", tmp_path / "out"), 1, "pip install 'edge-runtime[distill]'")
    config.write_text('{"stage": "base"}')
    assert_clear(cli("distill", "-c", config, "-o", tmp_path / "out"), 1, "pip install 'edge-runtime[distill]'")
    assert not (tmp_path / "out").exists()


def test_quantize_and_distill_take_folders(config, tmp_path):
    folder = write_hf_folder(tmp_path / "hf", config=hf_config(hidden_size=64, intermediate_size=64), dtype="BF16")
    done = cli("quantize", folder, tmp_path / "small.gguf", "--type", "Q4_0")
    assert done.returncode == 0, done.stderr
    with GGUFFile(tmp_path / "small.gguf") as file:
        assert config_from_gguf(file).name == "hf" and file.tensors["blk.0.ffn_up.weight"].type == "Q4_0"
    assert not list(tmp_path.glob(".converting*"))
    pytest.importorskip("torch")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "teacher": {"model": "hf"}, "student": {"keep": [2]}}))
    done = cli("distill", "-c", config, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config(model_type="gpt_neox")))
    assert_clear(cli("quantize", folder, tmp_path / "b.gguf"), 1, "gpt_neox")
