"""The bench beside the real llama.cpp, and the two on the same tokens."""
from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_runtime.apps.bench_client import Worker, open_peers
from edge_runtime.cli import app
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.gguf_factory import write_model

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, width=256, heads=8, kv_heads=2,
                       head_size=64, ffn=512, tokenizer="spm")


def test_every_row_has_both_figures(path):
    done = CliRunner().invoke(app, ["bench", str(path), "--prefill", "32", "--decode", "4", "--depth", "0,64",
                                    "--batch", "1,3", "--repeat", "1", "--threads", "1", "--vs", "llama.cpp", "--json"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 8
    for row in rows:
        assert row["llama_cpp"] > 0 and row["ratio"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["llama_cpp"], rel=0.2)


def test_both_workers_compute_the_same_model(path, tmp_path):
    ids = np.random.default_rng(2).integers(0, 600, 20).tolist()
    with GGUFFile(path) as file:
        want = ReferenceModel.load(file).forward(ids)
    peers = open_peers(path, 1, 256, probe_prompt=16)
    ours = Worker("ours")
    try:
        ours.call("load", path=str(path), threads=1, tokens=256, kv="int8")
        for worker in (ours, peers.worker("decode")):
            assert worker is not None
            for as_prompt in (True, False):
                out = tmp_path / "logits.npy"
                worker.call("logits", token_ids=ids, out=str(out), as_prompt=as_prompt)
                assert np.abs(np.load(out) - want).max() <= 0.05 * np.abs(want).max()
    finally:
        ours.close()
        peers.close()
