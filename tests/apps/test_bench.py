"""The bench on a small random model: rows, shares, and workers that fail."""
from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_runtime.apps.bench import BenchPlan, Work, comparison, format_row, run_bench
from edge_runtime.apps.bench_client import Worker, WorkerError, candidate_paths, open_peers
from edge_runtime.apps.bench_worker import peak_memory, serve
from edge_runtime.cli import app
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.gguf_factory import write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, types="Q8_0")


@pytest.fixture(scope="module")
def worker(path):
    found = Worker("ours")
    assert found.call("load", path=str(path), threads=1, tokens=200, kv="fp16")["threads"] == 1
    yield found
    found.close()


def test_rows_have_names_rates_and_shares(path):
    done = CliRunner().invoke(app, ["bench", str(path), "--prefill", "16,32", "--decode", "4", "--depth", "0,70",
                                    "--batch", "1,3", "--repeat", "2", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["prefill_16", "prefill_32", "decode_at_0", "decode_at_70", "batch_1", "batch_3", "load",
                          "first_token", "peak_rss"]
    for name, row in rows.items():
        assert row["value"] > 0 and row["llama_cpp"] is None and row["ratio"] is None, name
    assert all(len(row["runs"]) == 2 for name, row in rows.items() if "_at_" in name or "batch" in name)
    assert 0 <= rows["prefill_32"]["share_of_peak"] < 1 and "measured" in rows["prefill_32"]["peak"]
    assert rows["decode_at_0"]["share_of_bandwidth"] >= 0  # such a small model may be read from a cache
    assert rows["first_token"]["value"] >= rows["load"]["value"]
    assert 20 < rows["peak_rss"]["value"] < 2000


def test_what_a_token_costs(path):
    with GGUFFile(path) as file:
        work = Work.of(file, config_from_gguf(file), "int8")
    # 2 layers of q, o 64 x 64, k, v 32 x 64, gate, up, down 128 x 64; a tied head of 600 x 64
    assert work.layer_weights == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert work.head_weights == 600 * 64
    assert work.weight_bytes == (work.layer_weights + work.head_weights) // 32 * 34
    assert work.step_bytes(3, 100) == work.weight_bytes + 300 * work.kv_bytes
    assert work.prefill_operations(1) == 2 * (work.layer_weights + work.head_weights) + 4 * 64 * 2 // 2


@pytest.mark.parametrize("as_prompt", [True, False])
def test_our_worker_computes_the_model(worker, path, tmp_path, as_prompt):
    """Speed is measured on the same steps that give these logits."""
    ids = np.random.default_rng(1).integers(0, 600, 70).tolist()
    out = tmp_path / "logits.npy"
    worker.call("decode", depth=64, tokens=3)  # leaves KV behind
    worker.call("logits", token_ids=ids, out=str(out), as_prompt=as_prompt)
    with GGUFFile(path) as file:
        want = ReferenceModel.load(file).forward(ids)
    got = np.load(out)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()


def test_kv_is_counted_and_given_back(worker):
    assert worker.call("batch", sequences=4, depth=64, tokens=2) > 0
    held = worker.call("kv_bytes")
    worker.call("prefill", tokens=130)
    assert worker.call("kv_bytes") >= held > 0
    assert worker.call("peak_memory") > 20e6


def test_errors_of_a_runner_come_back_and_it_goes_on(worker):
    with pytest.raises(WorkerError, match="AttributeError"):
        worker.call("no_such_thing")
    assert worker.call("prefill", tokens=8) > 0


def test_a_worker_that_dies_says_how(path):
    worker = Worker("ours", label="this one")
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(WorkerError, match=r"this one.*SIGKILL"):
        worker.call("load", path=str(path), threads=1, tokens=8)
    worker.close()


def test_a_missing_peer_is_a_remark(path, monkeypatch, tmp_path):
    """A folder whose llama_cpp cannot be imported stands in for machines without any."""
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('none here')")
    monkeypatch.setattr("edge_runtime.apps.bench_client.candidate_paths", lambda: [str(tmp_path)])
    said: list[str] = []
    peers = open_peers(path, 1, 64, say=said.append)
    assert not peers.best and "none here" not in str(peers.best)
    assert "edge-runtime[llamacpp]" in peers.notes[0] and said
    rows = run_bench(path, BenchPlan(prefill=(8,), decode=2, repeat=1, threads=1, peer=True))
    assert rows[0]["llama_cpp"] is None and "edge-runtime[llamacpp]" in rows[0]["detail"]


def test_other_builds_are_named_by_the_environment(monkeypatch):
    monkeypatch.delenv("EDGE_RUNTIME_PEER_PATH", raising=False)
    assert candidate_paths() == [None]
    monkeypatch.setenv("EDGE_RUNTIME_PEER_PATH", "/a:/b" if sys.platform != "win32" else "/a;/b")
    assert candidate_paths() == [None, "/a", "/b"]


@pytest.mark.parametrize("arguments, word", [
    (["--prefill", "x"], "prefill"), (["--prefill", "0"], "prefill"), (["--depth", "5000"], "context"),
    (["--decode", "0"], "decode"), (["--vs", "vllm"], "llama.cpp"), (["--repeat", "0"], "repeat"),
    (["--prefill", "", "--depth", ""], "prefill"), (["--threads", "0"], "threads"), (["--kv", "int1"], "kv")])
def test_wrong_values_are_refused_before_anything_runs(path, arguments, word):
    done = CliRunner().invoke(app, ["bench", str(path), *arguments])
    assert done.exit_code == 2 and word in done.stderr, done.stderr


def test_plan_knows_its_longest_sequence():
    assert BenchPlan(prefill=(512,), depth=(0, 4096), decode=64).tokens == 4160
    assert BenchPlan(prefill=(), depth=(), batch=(2,)).tokens == 272
    with pytest.raises(InvalidRequestError):
        BenchPlan(prefill=(), depth=()).check(None)  # type: ignore[arg-type]


def test_rows_print():
    row = comparison("load", 1.0, 2.0, "s")
    assert row["ratio"] == 0.5 and "lower is better" in format_row(row)
    assert "llama.cpp" not in format_row(comparison("prefill_512", 10.0, None, "tokens/s"))


def test_serve_answers_line_by_line():
    class Fake:
        def prefill(self, tokens):
            return tokens * 2

    out = io.StringIO()
    serve(Fake(), io.StringIO('{"do": "prefill", "tokens": 4}\n{"do": "prefill"}\n'), out)  # type: ignore[arg-type]
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"result": 8} and "TypeError" in second["error"]
    assert peak_memory() > 1e6


def test_prints_of_libraries_do_not_reach_the_answers(path):
    code = ("import sys; sys.argv[1:] = ['ours']\nimport edge_runtime.apps.bench_worker as w\n"
            "class R:\n    def prefill(self): print('noise'); return 1\n"
            "w.make_runner = lambda name: R()\nw.main()")
    done = subprocess.run([sys.executable, "-c", code], input='{"do": "prefill"}\n', capture_output=True, text=True)
    assert done.stdout == '{"result": 1}\n' and "noise" in done.stderr


def test_replies_with_early_exit_stand_beside_full_ones(tmp_path):
    path = write_model(tmp_path / "exits.gguf", layers=4, vocab=300, types="Q8_0", exit_layers=(1, 2))
    done = CliRunner().invoke(app, ["bench", str(path), "--prefill", "8", "--decode", "40", "--repeat", "1", "--kv",
                                    "fp16", "--threads", "1", "--early-exit", "verify,recompute", "--exit-threshold",
                                    "1=0.001", "--json"])
    assert done.exit_code == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    full, verify, recompute = rows["reply_full"], rows["reply_verify"], rows["reply_recompute"]
    assert full["x_full"] == 1 and full["layers_per_token"] is None
    assert verify["same_tokens"] == 1.0 and 0 <= verify["acceptance"] <= 1
    assert recompute["layers_per_token"] < 4 and recompute["exits"]["1"] > 0
    assert "layers per token" in recompute["detail"]


@pytest.mark.parametrize("options, words", [
    (["--early-exit", "guess"], "verify, recompute, propagate"), (["--exit-threshold", "1=0.5"], "early_exit"),
    (["--early-exit", "verify", "--exit-threshold", "much"], "LAYER=CONFIDENCE"),
    (["--early-exit", "verify", "--exit-layers", "1,x"], "layers with commas")])
def test_bad_exit_options_are_refused(path, options, words):
    done = CliRunner().invoke(app, ["bench", str(path), "--prefill", "8", "--decode", "2", "--repeat", "1", "--threads",
                                    "1", *options])
    assert done.exit_code == 2 and words in done.stderr
