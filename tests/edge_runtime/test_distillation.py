"""Whole distillations of tiny models: what they learn, write and refuse, and runs that are killed and resumed."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import CorruptModelError, DeviceError, InvalidRequestError, UnsupportedModelError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.recipes.distill_config import DistillConfig, config_from
from tests.gguf_factory import write_model

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from edge_runtime.distillation import distill  # noqa: E402
from edge_runtime.models.recipes.checkpoint import cut_log, save_checkpoint  # noqa: E402
from edge_runtime.size_curve import size_curve  # noqa: E402

TEXT = "the ship left the harbour at nine and the harbour was quiet again until the next ship came in at noon"


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with a teacher of four layers and a text."""
    folder = tmp_path_factory.mktemp("ground")
    write_model(folder / "teacher.gguf", types="F32", layers=4, width=64, heads=4, kv_heads=2, ffn=128, scale=2.0)
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join(rng.choice(TEXT.split(), 900)), encoding="utf-8")
    return folder


def config(ground: Path, **tables) -> DistillConfig:
    values: dict = {
        "teacher": {"model": str(ground / "teacher.gguf")}, "text": {"files": [str(ground / "text.txt")]},
        "cache": {"top_k": 16}, "student": {"layers": 3},
        "training": {"steps": 12, "context": 64, "rows_per_step": 4, "learning_rate": 2e-3, "threads": 1,
                     "precision": "float32"}}
    for name, table in tables.items():
        values[name] = values.get(name, {}) | table
    return config_from(values)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_student_learns_and_is_written(ground, tmp_path):
    seen = []
    chosen = config(ground, student={"layers": 3, "kv_heads": 1, "ffn": 96, "exit_layers": [1, 2]},
                    training={"steps": 36, "layer_dropout": 0.1, "hidden": 0.1, "rows_per_pass": 2,
                              "learning_rate": 5e-3, "kl": 1.0},  # a random teacher does not agree with the text
                    export={"type": "Q8_0", "name": "small"})
    done = distill(chosen, tmp_path, progress=lambda phase, at, total, entry: seen.append((phase, at, total)))
    assert done.steps == 36 and done.after["kl"] < 0.9 * done.before["kl"]
    assert done.after["held_out"] and set(done.after["exits"]) == {"1", "2"}
    assert done.parameters < done.teacher_parameters and done.bytes_per_token == 16 * 4 + 8
    assert {phase for phase, *_ in seen} == {"teacher", "training"} and seen[-1] == ("training", 36, 36)
    with GGUFFile(ground / "teacher.gguf") as teacher, GGUFFile(done.model) as student:
        found = config_from_gguf(student)
        assert (found.layers, found.heads, found.kv_heads, found.ffn) == (3, 2, 1, 96)
        assert found.exit_layers == (1, 2) and found.name == "small"
        assert student.tensors["blk.0.attn_q.weight"].type == "Q8_0"
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
            assert student.metadata[key] == teacher.metadata[key]
    assert json.loads((tmp_path / "result.json").read_text())["after"]["kl"] == done.after["kl"]
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "kl", "entropy", "kl_exit1", "hidden", "tokens_per_second", "norm", "rate"} <= set(entry)


def test_an_untouched_copy_starts_at_the_teacher(ground, tmp_path):
    """No layer left out: what remains is the difference between float32 products and the runtime's."""
    done = distill(config(ground, student={"layers": 0}, training={"steps": 1, "learning_rate": 1e-9}), tmp_path)
    assert done.before["kl"] < 5e-3


def test_a_new_student_and_one_from_a_file(ground, tmp_path):
    new = config(ground, student={"start": "new", "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 64},
                 training={"steps": 3}, cache={"folder": str(tmp_path / "cache")})
    first = distill(new, tmp_path / "a")
    assert first.parameters < first.teacher_parameters / 2
    again = replace(new, student=replace(new.student, start=str(first.floats), layers=1, width=0, heads=0, kv_heads=0,
                                         ffn=0))
    stamp = (tmp_path / "cache" / "logits.bin").stat().st_mtime_ns
    second = distill(again, tmp_path / "b")
    with GGUFFile(second.model) as file:
        assert (config_from_gguf(file).layers, config_from_gguf(file).width) == (1, 32)
    assert (tmp_path / "cache" / "logits.bin").stat().st_mtime_ns == stamp  # the teacher was not asked again


def test_influence_chooses_layers(ground, tmp_path):
    done = distill(config(ground, student={"layers": 2, "choose": "influence"}, training={"steps": 1}), tmp_path)
    with GGUFFile(done.model) as file:
        assert config_from_gguf(file).layers == 2


SCRIPT = """
import json, sys
from edge_runtime.distillation import distill
from edge_runtime.models.recipes.distill_config import config_from
distill(config_from(json.loads(sys.argv[1])), sys.argv[2], resume=True)
"""


def test_a_killed_training_resumes_to_the_same_losses(ground, tmp_path):
    values = {
        "teacher": {"model": str(ground / "teacher.gguf")}, "text": {"files": [str(ground / "text.txt")]},
        "cache": {"top_k": 16, "folder": str(tmp_path / "cache")}, "student": {"layers": 2, "exit_layers": [1]},
        "training": {"steps": 24, "context": 64, "rows_per_step": 4, "threads": 1, "precision": "float32",
                     "save_every": 0, "layer_dropout": 0.2}}
    distill(config_from(values), tmp_path / "whole")
    command = [sys.executable, "-c", SCRIPT, json.dumps(values), str(tmp_path / "cut")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log, until = tmp_path / "cut" / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if log.exists() and len(log.read_text().splitlines()) >= 5:
            process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
            break
        time.sleep(0.01)
    process.wait(timeout=60)
    assert process.returncode != 0, "the training ended before it could be killed"
    cut = len(losses(tmp_path / "cut"))
    assert 5 <= cut < 24
    done = distill(config_from(values), tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and done.steps == 24
    a, b = (np.fromfile(tmp_path / name / "student-f32.gguf", np.uint8) for name in ("cut", "whole"))
    np.testing.assert_array_equal(a, b)
    assert "kl" in done.before


def test_a_folder_with_a_training_is_not_overwritten(ground, tmp_path):
    chosen = config(ground, training={"steps": 2})
    distill(chosen, tmp_path)
    with pytest.raises(InvalidRequestError, match="--resume"):
        distill(chosen, tmp_path)
    assert distill(chosen, tmp_path, resume=True).steps == 2  # writes the files again
    for change, word in (({"steps": 3}, "training.steps=3: must be 2"), ({"temperature": 3.0}, "cache")):
        with pytest.raises(InvalidRequestError, match=word):
            distill(config(ground, training={"steps": 2, **change}), tmp_path, resume=True)
    with pytest.raises(InvalidRequestError, match="exit_layers"):
        distill(config(ground, student={"exit_layers": [1]}, training={"steps": 2}), tmp_path, resume=True)
    other = write_model(tmp_path / "other.gguf", types="F32", layers=4, width=64, ffn=128, seed=9)
    with pytest.raises(InvalidRequestError, match=r"source\.teacher"):
        distill(config(ground, teacher={"model": str(other)}, cache={"folder": str(tmp_path / "fresh")},
                       training={"steps": 2}), tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["steps"] == 2  # not a refused one's
    (tmp_path / "result.json").write_text('{"bef')
    with pytest.raises(CorruptModelError, match="no result"):
        distill(chosen, tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CorruptModelError, match="no checkpoint"):
        distill(chosen, tmp_path, resume=True)
    save_checkpoint(tmp_path / "checkpoint.safetensors", {}, {"step": 3})  # as a stage of the recipe writes
    with pytest.raises(CorruptModelError, match="of another kind"):
        distill(chosen, tmp_path, resume=True)


def test_a_full_disk_leaves_the_small_files(ground, tmp_path, monkeypatch):
    chosen = config(ground, training={"steps": 2})
    distill(chosen, tmp_path)
    small = {name: (tmp_path / name).read_bytes() for name in ("config.json", "result.json", "log.jsonl")}
    write = Path.write_text

    def full(self: Path, text: str, **options) -> int:
        write(self, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        distill(chosen, tmp_path, resume=True)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in small} == small
    assert not list(tmp_path.glob("*.partial"))


def test_the_log_is_cut_where_it_lies(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 0}\n{"step": 1}\n{"st')
    inode = log.stat().st_ino
    cut_log(log, 2)
    assert log.read_bytes() == b'{"step": 0}\n{"step": 1}\n' and log.stat().st_ino == inode
    cut_log(log, 5)
    assert len(log.read_bytes()) == 24
    cut_log(tmp_path / "none", 1)


def test_another_teacher_cannot_use_the_cache(ground, tmp_path):
    shared = {"folder": str(tmp_path / "cache")}
    distill(config(ground, cache=shared, training={"steps": 1}), tmp_path / "a")
    other = write_model(tmp_path / "other.gguf", types="F32", layers=4, width=64, ffn=128, seed=9)
    with pytest.raises(InvalidRequestError, match="this run's teacher "):
        distill(config(ground, cache=shared, teacher={"model": str(other)}, training={"steps": 1}), tmp_path / "b")


def test_another_vocabulary_is_refused(ground, tmp_path):
    wide = write_model(tmp_path / "wide.gguf", vocab=310)
    for other in (wide, write_model(tmp_path / "spm.gguf", tokenizer="spm")):
        with pytest.raises(UnsupportedModelError, match=r"another vocabulary.*own tokens"):
            distill(config(ground, student={"start": str(other), "layers": 0}), tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_bad_sizes_are_named_before_the_teacher_runs(ground, tmp_path, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr("edge_runtime.distillation.ask_teacher", never)
    (tmp_path / "short.txt").write_text("the ship left")
    for tables, words in (
            ({"student": {"layers": 3, "exit_layers": [3]}}, "from 1 to 2, below the student's 3"),
            ({"student": {"layers": 5}}, "layers=5: must be at most 4"),
            ({"student": {"layers": 0, "keep": [1, 5]}}, "keep"),
            ({"student": {"layers": 3, "ffn": 129}}, "ffn=129"),
            ({"student": {"layers": 3, "kv_heads": 3}}, "kv_heads=3"),
            ({"student": {"start": "new", "layers": 2, "heads": 3}}, "divisor of the 3 heads"),
            ({"student": {"start": "new", "layers": 2}, "training": {"hidden": 1.0}}, "training.hidden"),
            ({"training": {"device": "cuda:99"}}, "training.device='cuda:99'"),
            ({"training": {"device": "meta"}}, "training.device=.meta."),
            ({"training": {"context": 4000}}, "at most 2048, the teacher's"),
            ({"text": {"files": [str(tmp_path / "short.txt")]}}, "longer than one context of 64"),
            ({"cache": {"top_k": 301}}, "at most 300"),
            ({"text": {"files": ["nowhere.txt"]}}, "exists")):
        with pytest.raises((InvalidRequestError, DeviceError), match=words):
            distill(config(ground, **tables), tmp_path / "out")


def test_a_full_disk_leaves_the_last_checkpoint(ground, tmp_path, monkeypatch):
    from edge_runtime.models.recipes import checkpoint

    chosen, sync, calls = config(ground, training={"save_every": 0.0}), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) > 4:  # the cache, the first checkpoint, two steps
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        distill(chosen, tmp_path / "cut")
    monkeypatch.undo()
    distill(chosen, tmp_path / "cut", resume=True)
    distill(chosen, tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 12


def test_size_against_quality(ground, tmp_path):
    chosen = config(ground, curve={"sizes": [[0, 0, 0], [3, 1, 96]], "recover_steps": 12}, export={"type": "Q8_0"},
                    training={"kl": 0.0, "learning_rate": 5e-3})
    seen = []
    points = size_curve(chosen, tmp_path, report=seen.append)
    assert points == seen and [(p.layers, p.kv_heads, p.ffn) for p in points] == [(4, 2, 128), (3, 1, 96)]
    assert points[0].bytes > points[1].bytes > 0
    assert all(p.recovered is not None and p.recovered < p.perplexity for p in points)
    assert json.loads((tmp_path / "curve.json").read_text())[1]["recovered"] == points[1].recovered
    with pytest.raises(InvalidRequestError, match="--resume"):
        size_curve(chosen, tmp_path)
    assert size_curve(chosen, tmp_path, resume=True) == points
    for sizes, words in (([], "at least one"), ([[1, 2]], "kv_heads, ffn"), ([[5, 0, 0]], "1 to 4")):
        with pytest.raises(InvalidRequestError, match=words):
            size_curve(config(ground, curve={"sizes": sizes}), tmp_path / "new")
