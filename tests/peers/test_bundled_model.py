"""The bundled model's file in llama.cpp, and the recipe's training with torch."""
from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from edge_runtime.models import bundled
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.recipes.config import MINUSCULE

pytestmark = pytest.mark.peers

TRAIN = [sys.executable, "-m", "edge_runtime.models.recipes.train", "--minuscule", "--eager"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(folder: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A folder of 20 unbroken steps, computed in the training process itself."""
    folder = tmp_path_factory.mktemp("unbroken")
    subprocess.run([*TRAIN, "--out", str(folder), "--workers", "0"], check=True, env=ONE_THREAD, timeout=120)
    return folder


def test_twenty_steps_reduce_the_loss(trained):
    curve = losses(trained)
    assert len(curve) == MINUSCULE.steps
    assert np.mean(curve[-3:]) < np.mean(curve[:3]) - 0.5


def test_a_killed_run_resumes_to_the_same_losses(trained, tmp_path):
    process = subprocess.Popen([*TRAIN, "--out", str(tmp_path), "--workers", "1", "--save-every", "0"], env=ONE_THREAD)
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.jsonl").exists() or len(losses(tmp_path)) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(losses(tmp_path))
    assert reached < MINUSCULE.steps
    subprocess.run([*TRAIN, "--out", str(tmp_path), "--workers", "1", "--resume"], check=True, env=ONE_THREAD,
                   timeout=120)
    assert losses(tmp_path) == losses(trained)


def test_the_shared_work_of_two_processes_gives_the_same_losses(trained, tmp_path):
    subprocess.run([*TRAIN, "--out", str(tmp_path), "--workers", "2"], check=True, env=ONE_THREAD, timeout=120)
    assert losses(tmp_path) == losses(trained)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_an_export_computes_what_torch_computes(trained, tmp_path, kind):
    import torch

    from edge_runtime.models.recipes.export import export
    from edge_runtime.models.recipes.train import load_network
    from edge_runtime.models.reference import ReferenceModel

    from .llama_cpp_model import llama_cpp_logits

    path = tmp_path / "model.gguf"
    assert export(trained, path, kind, kind) == path.stat().st_size
    config, _, network = load_network(trained)
    ids = np.random.default_rng(3).integers(0, config.network.vocab_size, 90)
    with torch.no_grad():
        want = network(torch.from_numpy(ids[None]))[0].numpy()
    with GGUFFile(path) as file:
        reference = ReferenceModel.load(file).forward(ids)
    for logits in (reference, llama_cpp_logits(path, ids)):
        if kind == "F32":
            np.testing.assert_allclose(logits, want, atol=1e-3)
        else:  # the planted heads are sharp: a rounded score may pick another place now and then
            assert np.corrcoef(logits.ravel(), want.ravel())[0, 1] > 0.98


def test_one_command_makes_every_stage_the_file_its_figures_and_its_card(tmp_path):
    from edge_runtime.models.recipes import build, pruning, stages

    def short(recipe, layers):
        network = dataclasses.replace(MINUSCULE.network, layers=layers)
        return dataclasses.replace(
            MINUSCULE, network=network, steps=2, rate_points=((0, 1.0), (2, 0.0)), start=recipe.start,
            teacher=recipe.teacher, exits=(1,) if recipe.exits else (), quantize=recipe.quantize)

    small = {name: short(recipe, 2 if name == "base" else 3) for name, recipe in stages.STAGES.items()}
    out, work = tmp_path / "tiny.gguf", tmp_path / "work"
    card = build.build(out, work, small, workers=0, documents=2, prune=False, compiled=False)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["what"] for row in figures["rows"]] == [
        "student vs control KL", "key facts", "exact answers", "INT4 (QAT) vs float perplexity"]
    assert figures["exit_layers"] == [1] and list(figures["exits"]) == ["1"]
    assert set(figures["training"]) == set(stages.STAGES) and figures["bytes"] == out.stat().st_size
    assert "after 1 layers" in card.read_text() and f"{figures['parameters']:,}" in card.read_text()
    recovery = short(stages.STAGES["base"], 3)
    points = pruning.curve(work, sizes=((2, 1, 64),), recovery=dataclasses.replace(recovery, steps=1), workers=0,
                           documents=2, compiled=False)
    assert [(p["layers"], p["heads"], p["ffn"]) for p in points] == [(3, 4, 128), (2, 2, 64)]
    assert points[1]["parameters"] < points[0]["parameters"]
    assert pruning.curve(work, sizes=((2, 1, 64),), recovery=recovery, workers=0) == points


def test_muon_makes_updates_orthogonal():
    import torch

    from edge_runtime.models.recipes.optimizer import orthogonalize

    x = torch.randn(3, 32, 80, generator=torch.Generator().manual_seed(5))
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert values.min() > 0.5 and values.max() < 1.5


def test_attention_with_explicit_scores_is_torchs_own():
    import torch

    from edge_runtime.models.recipes.network import attend

    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v), want, atol=1e-5, rtol=1e-4)


def test_the_bundled_file_fits_and_describes_itself():
    assert bundled.path().stat().st_size < 10_000_000
    with GGUFFile(bundled.path()) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["general.name"] == "Edge Tiny"
        assert file.metadata["general.license"] == "apache-2.0"
        assert file.metadata["general.author"] == "Edge Runtime project"
        assert "<|im_start|>" in file.metadata["tokenizer.chat_template"]
        parameters = sum(int(np.prod(info.shape)) for info in file.tensors.values())
    assert 5_000_000 <= parameters <= 10_000_000


def test_llama_cpp_runs_the_bundled_file_and_the_summaries_keep_the_facts():
    from edge_runtime.models.recipes.evaluate import evaluate
    from edge_runtime.models.recipes.llama_cpp_generate import llama_cpp_generator

    score = evaluate(llama_cpp_generator(bundled.path()), "held_out", 40, seed=99)
    # A floor under the card's figures, for this many documents: it catches a broken file, not a weak one.
    assert score.facts_kept >= 0.85, dataclasses.asdict(score)
    assert score.answers_exact >= 0.4, dataclasses.asdict(score)
