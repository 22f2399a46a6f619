"""Quality against speed of early exit: the points, their table, the plot, the command."""
from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_runtime import calibration
from edge_runtime.apps import exit_curve, exit_plot
from edge_runtime.apps.exit_curve import Point, Setting, Task
from edge_runtime.cli import app
from edge_runtime.early_exit import EarlyExit
from edge_runtime.errors import InvalidRequestError, MissingExtraError
from edge_runtime.exit_trace import CRITERIA, ExitTrace
from edge_runtime.llm import LLM
from tests.edge_runtime.test_calibration_store import ONE
from tests.gguf_factory import write_model

EXITS = (1, 2)


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", layers=4, exit_layers=EXITS, context_length=256)


def trace() -> ExitTrace:
    """Two sequences; exit 1 is sure of every other token, exit 2 of all, and right."""
    sure = np.array([[0.95, 0.2, 0.95, 0.2, 0.95, 0.2], [0.99] * 6], np.float32)
    wrong = np.array([[False, True, True, True, False, False], [False] * 6])
    return ExitTrace(EXITS, 4, dict.fromkeys(CRITERIA, sure), wrong, np.array([0, 2, 6]), np.zeros(6, np.int32))


def test_every_kind_of_setting_is_there():
    found = exit_curve.settings(EXITS, ["max_prob", "entropy"], "recompute", {"entropy": {2: 0.7}})
    kinds = [s.kind for s in found]
    assert kinds.count("layer") == 2 and kinds.count("threshold") == 2 * len(exit_curve.THRESHOLDS)
    assert kinds[:2] == ["full", "verify"] and kinds.count("calibrated") == 1
    assert found[-1].early == EarlyExit("recompute", "entropy", {2: 0.7})
    with pytest.raises(InvalidRequestError, match="verify"):
        exit_curve.settings(EXITS, ["max_prob"], "verify")
    with pytest.raises(InvalidRequestError, match="exit"):
        exit_curve.settings((), ["max_prob"])


def test_quality_by_hand():
    of = lambda early: exit_curve.quality(trace(), Setting("s", "threshold", early))
    full = of(None)
    assert (full.agreement, full.layers_per_token, full.leaving) == (1.0, 4.0, {4: 1.0})
    first = of(EarlyExit("propagate", "layer", layer=1))
    assert first.agreement == pytest.approx(0.5) and first.layers_per_token == 1
    both = of(EarlyExit("propagate", thresholds={1: 0.9, 2: 0.9}))
    assert both.agreement == pytest.approx(5 / 6) and both.leaving == {1: 0.5, 2: 0.5}
    some = of(EarlyExit("propagate", thresholds={1: 0.9}))
    assert some.leaving == {1: 0.5, 4: 0.5}
    capped = of(EarlyExit("recompute", "layer", layer=2, max_pending=1))
    assert capped.leaving == {2: 0.5, 4: 0.5}


def test_whole_replies_are_timed_in_turns(model):
    with LLM(model, threads=1) as llm:
        chosen = [s for s in exit_curve.settings(llm.exit_layers, ["max_prob"]) if s.kind != "threshold"]
        points = [Point(s.name, s.kind) for s in chosen]
        ids = llm.tokenize("The red boat came in.")
        full = llm.generate(ids, max_tokens=12, temperature=0.0)
        tasks = [Task(ids, (full.text[:4], "no such fact")), Task(ids[::-1])]
        told = []
        made = exit_curve.speed(llm, points, chosen, tasks, 12, 2, lambda *now: told.append(now))
    by_name = {p.name: p for p in made}
    assert told[-1] == (8, 8)
    assert all(p.tokens_per_second and p.tokens_per_second > 0 and p.speedup for p in made)
    assert by_name["full model"].speedup == 1 and by_name["full model"].facts_kept == 0.5
    assert by_name["verify"].same_replies == 1
    assert by_name["layer 1"].facts_kept in (0, 0.5) and by_name["layer 1"].acceptance is None
    assert len(exit_curve.table(made).splitlines()) == 5


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    points = [Point("full model", "full", layers_per_token=4, tokens_per_second=10.0, facts_kept=1.0),
              Point("verify", "verify", layers_per_token=4, tokens_per_second=15.0, facts_kept=1.0),
              Point("layer 2", "layer", "layer", agreement=0.5, layers_per_token=2, tokens_per_second=20.0),
              Point("max_prob 0.5", "threshold", "max_prob", agreement=0.8, layers_per_token=2.5),
              Point("max_prob calibrated", "calibrated", "max_prob", agreement=0.99, layers_per_token=3)]
    for name in ("a.png", "deep/b.svg"):
        exit_plot.check_plot(tmp_path / name)
        exit_plot.draw(points, tmp_path / name, "title")
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(InvalidRequestError, match="png"):
        exit_plot.check_plot(tmp_path / "a.txt")


def test_without_matplotlib_the_extra_is_named_before_anything_runs(monkeypatch, tmp_path, model):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[plot\]"):
        exit_plot.check_plot(tmp_path / "a.png")
    done = CliRunner().invoke(app, ["eval", str(model), "--exits", str(tmp_path / "a.png"), "--text", str(tmp_path)])
    assert done.exit_code == 1 and "edge-runtime[plot]" in done.stderr


def test_the_command_writes_numbers(model, tmp_path):
    from dataclasses import replace

    from edge_runtime.loading import fingerprint

    (tmp_path / "t.txt").write_text("Boats come in at dawn, and the fish is sold before noon. " * 40)
    calibration.save(replace(ONE, fingerprint=fingerprint(model), layers=4, exit_layers=EXITS, thresholds={2: 0.1}))
    run = lambda *more: CliRunner().invoke(app, [
        "eval", str(model), "--text", str(tmp_path / "t.txt"), "--threads", "1", "-n", "8", "--passage-tokens", "60",
        *map(str, more)])
    done = run("--exits", tmp_path / "out.json", "--replies", 2, "--repeat", 1, "--criterion", "max_prob,margin")
    assert done.exit_code == 0, done.stderr
    made = json.loads((tmp_path / "out.json").read_text())
    points = {p["name"]: p for p in made["points"]}
    assert made["exit_layers"] == [1, 2] and points["verify"]["same_replies"] == 1 and "full model" in done.stdout
    assert points["max_prob calibrated"]["thresholds"] == {"2": 0.1} and "margin calibrated" not in points
    assert points["margin 0.5"]["tokens_per_second"] is None and points["max_prob 0.5"]["tokens_per_second"] > 0
    for arguments, word in ((("--exits", tmp_path / "a.txt"), "png"), ((), "exits"),
                            (("--exits", "a.json", "--criterion", "luck"), "luck"),
                            (("--exits", "a.json", "--missing-kv", "verify"), "verify"),
                            (("--exits", "a.json", "--replies", "-1"), "replies"),
                            (("--exits", "a.json", "--exit-layers", "9"), "exit_layers")):
        refused = run(*arguments)
        assert refused.exit_code == 2 and word in refused.stderr and "Traceback" not in refused.output


def test_files_that_cannot_be_written_are_named_before_anything_runs(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("words")
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(LLM, "generate", None)
    for exits, word in ((tmp_path / "file" / "a.json", "file"), (tmp_path / "folder.json", "folder.json"),
                        (tmp_path / "folder.svg", "folder.json"), ("", "exits")):
        done = CliRunner().invoke(app, ["eval", str(model), "--exits", str(exits), "--text", str(tmp_path / "file")])
        assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.exception
        assert word in done.stderr and done.stderr.count("error:") == 1
