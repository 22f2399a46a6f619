"""Growing, rounding, the objective, and trainings that start from each other. Needs torch."""
from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edge_runtime.errors import InvalidRequestError, UnsupportedModelError  # noqa: E402
from edge_runtime.models.gguf_file import GGUFFile  # noqa: E402
from edge_runtime.models.recipes.batches import make_batch  # noqa: E402
from edge_runtime.models.recipes.checkpoint import load_checkpoint  # noqa: E402
from edge_runtime.models.recipes.config import MINUSCULE, NetworkConfig, RecipeConfig, recipe_from_json  # noqa: E402
from edge_runtime.models.recipes.divergence import folder_predictor, held_out_kl, tokenizer_of  # noqa: E402
from edge_runtime.models.recipes.export import EXIT_LAYERS, export  # noqa: E402
from edge_runtime.models.recipes.growing import grow  # noqa: E402
from edge_runtime.models.recipes.network import Network  # noqa: E402
from edge_runtime.models.recipes.objective import Objective  # noqa: E402
from edge_runtime.models.recipes.rounding import Rounding, input_squares  # noqa: E402
from edge_runtime.models.recipes.train import CHECKPOINT, load_network, train  # noqa: E402
from edge_runtime.models.reference import ReferenceModel  # noqa: E402
from edge_runtime.quant.dequantize import dequantize  # noqa: E402
from edge_runtime.quant.quantize import quantize  # noqa: E402

SHAPE = MINUSCULE.network
DEEPER = dataclasses.replace(SHAPE, layers=4, ffn=160)
ROOT = pathlib.Path(__file__).resolve().parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def stage(**changes) -> RecipeConfig:
    """A student of four layers with everything switched on."""
    return dataclasses.replace(
        MINUSCULE, network=dataclasses.replace(SHAPE, layers=4), steps=8, start="base", teacher="base", exits=(1, 3),
        layer_dropout=0.5, quantize="Q4_0", rate_points=((0, 0.1), (8, 0.0)), **changes)


def losses(folder: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """A folder of `base`, four steps of the test recipe, and `student`, which learned from it."""
    root = tmp_path_factory.mktemp("stages")
    base = dataclasses.replace(MINUSCULE, steps=4, rate_points=((0, 1.0), (4, 0.0)))
    train(base, root / "base", workers=0, compiled=False)
    train(stage(), root / "student", workers=0, compiled=False)
    return root


def test_a_grown_network_computes_what_the_small_one_computes():
    small, tokens = Network(SHAPE, 3), torch.arange(60)[None] * 7 % SHAPE.vocab_size
    large = grow(small, DEEPER, 4)
    assert large.config.parameters == sum(p.numel() for p in large.parameters())
    torch.testing.assert_close(large(tokens), small(tokens), atol=1e-4, rtol=1e-4)
    assert any(p.abs().sum() > 0 for p in large.blocks[3].parameters())


@pytest.mark.parametrize("change", [{"layers": 1}, {"ffn": 64}, {"width": 128}, {"vocab_size": 600}])
def test_what_cannot_grow_is_refused(change):
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        grow(Network(SHAPE), dataclasses.replace(SHAPE, **change))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packed_codes_are_the_values_that_training_computes_with(kind):
    network = Network(SHAPE, 5)
    rounding = Rounding.search(network, kind, "Q8_0")
    moved = {name: value + 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(6))
             for name, value in network.state_dict().items()}
    for name, value in moved.items():
        if name not in rounding.scales:
            assert value.ndim == 1 and torch.equal(rounding(name, value), value)
            continue
        got = dequantize(rounding.packed(name, value), rounding.types[name], tuple(value.shape))
        assert np.array_equal(got, rounding(name, value).numpy()), name


def test_the_first_codes_are_those_of_the_weighted_search():
    network = Network(SHAPE, 7)
    squares = input_squares(network, [torch.arange(200).view(2, 100)])
    rounding = Rounding.search(network, "Q4_0", "Q8_0", squares)
    for name in ("blocks.1.ffn.gate.weight", "embedding"):
        value = network.state_dict()[name]
        packed = quantize(value.numpy(), rounding.types[name], squares[name], method="search")
        assert np.array_equal(rounding.packed(name, value), packed)


def test_scales_survive_their_file(tmp_path):
    rounding = Rounding.search(Network(SHAPE, 8), "Q4_0", "Q8_0")
    rounding.save(tmp_path / "scales.safetensors")
    again = Rounding.load(tmp_path / "scales.safetensors")
    assert again.types == rounding.types
    assert all(torch.equal(again.scales[name], value) for name, value in rounding.scales.items())
    with pytest.raises(UnsupportedModelError, match="Q4_K"):
        Rounding(again.scales, {"embedding": "Q4_K"})


def test_a_network_that_is_its_own_teacher_diverges_by_nothing(folders):
    config, tokenizer, network = load_network(folders / "base")
    learning = dataclasses.replace(config, teacher="base", teacher_share=1.0)
    loss, parts = Objective(learning, network, network)(make_batch(config, tokenizer, 0), 0)
    assert abs(loss.item()) < 1e-5 and abs(parts["divergence"]) < 1e-5 and parts["cross_entropy"] > 1


def test_hidden_states_can_be_matched(folders):
    config, tokenizer, network = load_network(folders / "base")
    batch = make_batch(config, tokenizer, 0)
    other = Network(SHAPE, 9)
    matching = dataclasses.replace(config, teacher="base", teacher_share=0.5, hidden_share=0.5)
    near, _ = Objective(matching, network, network)(batch, 0)
    far, _ = Objective(matching, other, network)(batch, 0)
    assert abs(near.item()) < 1e-4 < 0.1 < far.item()


def test_exits_join_from_the_last_to_the_first_and_take_turns():
    config = stage(exit_curriculum=True)
    objective = Objective(config, Network(config.network))
    total = config.steps * config.batches_per_step
    assert [objective.exit_of(0), objective.exit_of(total // 4)] == [0, 3]
    assert {objective.exit_of(number) for number in range(total // 2, total)} == {1, 3}
    at_once = Objective(dataclasses.replace(config, exit_curriculum=False), objective.network)
    assert {at_once.exit_of(number) for number in range(4)} == {1, 3}


def test_layer_dropout_spares_the_first_layer_and_is_a_function_of_the_batch():
    objective = Objective(stage(), Network(stage().network))
    skipped = [objective.skipped(number) for number in range(400)]
    assert skipped == [objective.skipped(number) for number in range(400)]
    rates = [np.mean([layer in s for s in skipped]) for layer in range(4)]
    assert rates[0] == 0 and rates == sorted(rates) and 0.4 < rates[3] < 0.6


@pytest.mark.parametrize(("change", "named"), [
    ({"exits": (3, 1)}, "ascending"), ({"exits": (1, 1)}, "ascending"), ({"exits": (0,)}, "from 1 to 3"),
    ({"exits": (4,)}, "from 1 to 3"), ({"layer_dropout": 1.5}, "layer_dropout"), ({"temperature": 0.0}, "temperature"),
    ({"teacher_share": 0.8, "hidden_share": 0.4}, "hidden_share")])
def test_a_recipe_that_cannot_be_trained_is_refused(change, named):
    with pytest.raises(InvalidRequestError, match=named):
        dataclasses.replace(stage(), **change)


def test_a_recipe_with_exits_survives_json():
    assert recipe_from_json(stage().to_json()) == stage()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_student_resumes_to_the_same_losses(folders, tmp_path, workers):
    """Teacher, exits, layer dropout, rounding: killed with SIGKILL after a few steps, then gone on with."""
    (tmp_path / "base").symlink_to(folders / "base")
    (tmp_path / "recipe.json").write_text(stage().to_json())
    command = [sys.executable, "-m", "edge_runtime.models.recipes.train", "--out", str(tmp_path / "student"), "--eager",
               "--recipe", str(tmp_path / "recipe.json"), "--workers", str(workers), "--resume"]
    process = subprocess.Popen([*command, "--save-every", "0"], env=ONE_THREAD, cwd=ROOT)
    log, deadline = tmp_path / "student" / "log.jsonl", time.monotonic() + 120
    while not log.exists() or len(losses(log.parent)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(log.parent)) < 8
    subprocess.run(command, check=True, env=ONE_THREAD, cwd=ROOT, timeout=120)
    assert losses(log.parent) == losses(folders / "student")


def test_a_full_disk_leaves_the_old_checkpoint(folders, tmp_path):
    """A limit on the size of files stands for the full disk: writes beyond it fail with an OSError just the same."""
    folder = tmp_path / "run"
    train(dataclasses.replace(MINUSCULE, steps=1, rate_points=((0, 1.0), (1, 0.0))), folder, workers=0, compiled=False)
    before = (folder / CHECKPOINT).read_bytes()
    code = ("import pathlib, sys; from edge_runtime.models.recipes.train import *\n"
            "import dataclasses\n"
            "c = dataclasses.replace(MINUSCULE, steps=3, rate_points=((0, 1.0), (3, 0.0)))\n"
            "train(c, pathlib.Path(sys.argv[1]), resume=True, save_every=0, workers=0, compiled=False)\n")
    limit = len(before) // 2
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=ONE_THREAD, cwd=ROOT, capture_output=True, text=True,
        timeout=120, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode != 0 and "File too large" in result.stderr
    assert "the checkpoint after step 2 was not written" in result.stderr
    assert (folder / CHECKPOINT).read_bytes() == before
    assert not list(folder.glob("*.partial"))
    assert load_checkpoint(folder / CHECKPOINT)[1]["step"] == 1


def test_the_file_computes_what_training_saw_and_names_its_exits(folders, tmp_path):
    path = tmp_path / "student.gguf"
    assert export(folders / "student", path) == path.stat().st_size
    config, _, network = load_network(folders / "student")
    rounding = Rounding.load(folders / "student" / "scales.safetensors")
    network.load_state_dict({name: rounding(name, value) for name, value in network.state_dict().items()})
    ids = np.random.default_rng(3).integers(0, config.network.vocab_size, 60)
    with torch.no_grad():
        want = network(torch.from_numpy(ids[None]))[0].numpy()
    with GGUFFile(path) as file:
        assert list(file.metadata[EXIT_LAYERS]) == [1, 3]
        np.testing.assert_allclose(ReferenceModel.load(file).forward(ids), want, atol=2e-3)


def test_an_exit_exported_alone_is_the_model_left_there(folders, tmp_path):
    path = tmp_path / "exit.gguf"
    export(folders / "base", path, "F32", "F32", layers=1)
    ids = np.random.default_rng(4).integers(0, SHAPE.vocab_size, 50)
    with GGUFFile(path) as file:
        assert EXIT_LAYERS not in file.metadata
        got = ReferenceModel.load(file).forward(ids)
    np.testing.assert_allclose(got, folder_predictor(folders / "base", 1)(ids), atol=2e-3)


def test_divergence_is_zero_from_oneself_only(folders):
    base, student = (folder_predictor(folders / name) for name in ("base", "student"))
    found = held_out_kl({"base": base, "student": student}, base, tokenizer_of(folders / "base"), documents=3)
    assert abs(found["base"].all_text) < 1e-9 and found["base"].answers_agreement == 1
    assert found["student"].all_text > 0.001 and found["student"].tokens == found["base"].tokens > 300


def test_the_default_network_is_the_first_stage():
    assert NetworkConfig().parameters == 5_770_496
