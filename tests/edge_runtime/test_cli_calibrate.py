"""`edge-runtime calibrate` as a user runs it, on small models: what it stores, says and refuses."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_runtime import calibration_store, calibration_text
from edge_runtime.cli import app
from edge_runtime.early_exit import EarlyExit
from edge_runtime.exit_trace import Replay
from edge_runtime.llm import LLM
from edge_runtime.loading import fingerprint
from edge_runtime.models import bundled
from edge_runtime.models.names import layer_names
from tests.gguf_factory import random_weights, write_model

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def shallow(folder):
    """Its upper two layers do nothing: what leaves after the second is what the full model says."""
    weights = random_weights(architecture="llama", layers=LAYERS, width=64, heads=4, kv_heads=2, head_size=16, ffn=128,
                             vocab=300)
    for layer in (2, 3):
        weights[layer_names(layer).o][:] = 0
        weights[layer_names(layer).down][:] = 0
    return write_model(folder / "shallow.gguf", layers=LAYERS, weights=weights, types="F16", context_length=256,
                       exit_layers=(1, 2))


@pytest.fixture(scope="module")
def plain(folder):
    return write_model(folder / "plain.gguf", layers=LAYERS, context_length=256, seed=3)


@pytest.fixture(scope="module")
def texts(folder):
    (folder / "texts").mkdir()
    for i in range(90):
        (folder / "texts" / f"{i:02}.txt").write_text(f"note {i}: the {i * 7} boxes came at {i % 24}:00\n")
    return folder / "texts"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path / "data"))


def run(*arguments: object):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--threads", "1"])


def test_thresholds_are_stored_and_used(shallow, texts):
    done = run(shallow, "--text", texts, "--max-tokens", 12, "--json", "--criterion", "margin,max_prob")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert [one["criterion"] for one in made] == ["margin", "max_prob"] and made[0]["trained"] is True
    assert all("2" in one["thresholds"] and one["layers_per_token"] < 3 for one in made)
    assert all(one["documents"] == one["sequences"] <= 90 and one["measured_risk"] <= 0.05 for one in made)
    assert "stored in" in done.stderr and "layers per token" in done.stderr and "warning" not in done.stderr
    with LLM(shallow, threads=1, early_exit="recompute") as llm:
        reply = llm.generate("note 5", max_tokens=20, temperature=0.0)
        assert reply.stats.exits.get(2) and reply.stats.layers_per_token < LAYERS
        full = llm.generate("note 5", max_tokens=20, temperature=0.0, early_exit=False)
        assert not full.stats.exits and full.token_ids == reply.token_ids


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy"])
def test_replies_leave_where_the_trace_says(criterion, shallow):
    """Upper layers that do nothing keep replies the full model's, so that trace and reply see the same tokens."""
    with LLM(shallow, threads=1) as llm:
        decoded = calibration_text.replies(llm, list(enumerate(f"note {i}: boxes" for i in range(12))), max_tokens=30)
        trace = Replay(llm).trace(decoded)
        assert not trace.wrong[1].any()
        values = np.sort(trace.confidence[criterion][1])
        at = len(values) // 3 + int(np.diff(values[len(values) // 3:len(values) // 2]).argmax())
        limit = float(values[at:at + 2].mean())  # in a gap, where rounding decides nothing
        left = trace.with_cap(trace.leaves(criterion, (math.inf, limit)), 3)
        early = EarlyExit("recompute", criterion, {2: limit}, max_pending=3)
        for s, one in enumerate(decoded):
            reply = llm.generate(one.prompt, max_tokens=30, temperature=0.0, early_exit=early)
            depth = trace.depth(left)[trace.starts[s]:trace.starts[s + 1]]
            assert dict(reply.stats.exits) == dict(zip(*(v.tolist() for v in np.unique(depth, return_counts=True))))
            assert reply.token_ids[:len(one.rows)] == tuple(one.rows)


def test_the_bundled_model_brings_its_own_texts(tmp_path):
    out = tmp_path / "calibration.json"
    done = run("--exit-layers", "2,4", "--documents", 24, "--risk", 0.5, "--confidence", 0.8, "-n", 40, "--out", out)
    assert done.exit_code == 0, done.stderr
    (one,) = calibration_store.read(out)
    assert one.sequences <= 24 and one.fingerprint == fingerprint(bundled.path()) and "held-out" in one.text


def test_what_ships_is_of_the_bundled_model():
    """After another model: edge-runtime calibrate --criterion all --missing-kv all --risk 0.01 --out FILE."""
    shipped = Path(bundled.__file__).with_name("calibration.json")
    if not shipped.exists():
        pytest.skip("no calibration ships")
    found = calibration_store.read(shipped)
    assert {one.fingerprint for one in found} == {fingerprint(bundled.path())}
    with LLM(threads=1, early_exit="recompute") as llm:
        assert llm.generate("Hello", max_tokens=8, temperature=0.0).stats.layers_per_token > 0


def test_layers_that_were_not_trained_are_measured_with_a_warning(plain, texts):
    done = run(plain, "--text", texts, "--exit-layers", "2,3", "--risk", 0.6, "-n", 8, "--missing-kv", "all")
    assert done.exit_code == 0, done.stderr
    assert "not trained to be left after layers 2, 3" in done.stderr and "tokens right if all leave" in done.stderr
    assert len(list(calibration_store.folder().iterdir())) == 2


def test_lines_of_a_file_and_another_place_to_store(shallow, tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{i} little lines, one below the other"}) + "\n" for i in range(90)))
    out = tmp_path / "deep" / "thresholds.json"
    done = run(shallow, "--text", lines, "--as-written", "--raw", "--out", out, "--confidence", 0.9)
    assert done.exit_code == 0, done.stderr
    (one,) = calibration_store.read(out)
    assert one.documents == 90 and one.confidence == 0.9 and not calibration_store.folder().exists()
    lines.write_text('{"text": "a"}\n{"words": 3}\n')
    refused = run(shallow, "--text", lines)
    assert refused.exit_code == 2 and "texts.jsonl:2" in refused.stderr


@pytest.mark.parametrize("arguments, code, words", [
    (("--risk", "0"), 2, ("risk", "0")), (("--risk", "1.5"), 2, ("risk", "1.5")),
    (("--confidence", "95"), 2, ("confidence", "95")), (("--criterion", "luck"), 2, ("luck", "max_prob")),
    (("--criterion", "layer"), 2, ("layer", "max_prob")), (("--missing-kv", "verify"), 2, ("verify", "calibration")),
    (("--exit-layers", "2,1"), 2, ("exit_layers", "ascending")), (("--exit-layers", "4"), 2, ("exit_layers", "4")),
    (("--exit-layers", "0"), 2, ("exit_layers", "0")), (("--exit-layers", "two"), 2, ("exit_layers", "two")),
    (("--max-tokens", "1"), 2, ("max_tokens",)), (("--prompt", "Sum up"), 2, ("{document}",)),
    (("--passage-tokens", "3"), 2, ("passage_tokens", "3")), (("--bound", "hope"), 2, ("bound", "betting")),
    (("--risk", "0.001", "-n", "4"), 1, ("sequences", "at least 4090")), (("--out", "."), 2, ("folder",)),
    (("--seed", "-1"), 2, ("seed",)), (("--passage-tokens", "0"), 2, ("passage_tokens",)),
    (("--prompt", ""), 2, ("{document}",)),
])
def test_what_is_asked_wrongly_is_one_clear_line(arguments, code, words, shallow, texts):
    done = run(shallow, "--text", texts, *arguments)
    assert done.exit_code == code and "Traceback" not in done.output
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr


def test_what_cannot_do_is_said_before_the_model_replies(shallow, plain, texts, tmp_path, monkeypatch):
    """Replies to many texts take hours."""
    def replies(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(calibration_text, "replies", replies)
    (tmp_path / "file").write_text("")
    for arguments, words in (((shallow, "--text", texts, "--risk", 0.001), "at least 4090"),
                             ((plain, "--text", texts), "no exit layers"), (("--documents", 5), "at least 84"),
                             ((shallow, "--text", texts, "--out", tmp_path / "file" / "out.json"), "file")):
        done = run(*arguments)
        assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.exception
        assert words in done.stderr and done.stderr.count("error:") == 1
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path / "file"))
    done = run(shallow, "--text", texts)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit) and "file" in done.stderr


def test_texts_that_do_not_do(shallow, plain, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    done = run(shallow, "--text", short)
    assert done.exit_code == 1 and "tokens, of at least 256" in done.stderr and "Add " in done.stderr
    short.write_bytes(b"\0\1\2" * 400)
    assert run(shallow, "--text", short).exit_code == 1
    assert "no such file" in run(shallow, "--text", tmp_path / "none").stderr
    assert run(shallow).exit_code == 2 and "text" in run(shallow).stderr
    short.write_text("A text that is long enough for one context of this model. " * 40)
    done = run(plain, "--text", short)
    assert done.exit_code == 2 and "edge.early_exit.layers" in done.stderr
    done = run(shallow, "--text", short, "--passage-tokens", 40, "-n", 4, "--risk", 0.2)
    assert done.exit_code == 0 and "count as independent" in done.stderr, done.stderr
