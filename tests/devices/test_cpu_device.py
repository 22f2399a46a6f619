"""The CPU device against the float reference on the same weights: architectures, types, shapes, scalings."""
from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from edge_runtime.errors import DeviceError, TokenizerError
from edge_runtime.models.reference import ReferenceModel
from tests.devices.steps import Driver, divergence
from tests.gguf_factory import LLAMA3_ROPE, write_model

TOKENS = 90
# Mean KL divergence to the float reference. These models' logits have a standard deviation near 1; llama.cpp's own
# divergence on such files is 1e-4 to 4e-4, from int8 activations.
BOUND = 1.5e-3
MODELS = {
    "llama": dict(),
    "qwen2": dict(architecture="qwen2", heads=7, kv_heads=1, head_size=32, width=224, tied=False),
    "qwen3": dict(architecture="qwen3", head_size=64, width=96, heads=4, kv_heads=2),
    "one kv head": dict(heads=5, kv_heads=1, width=320, head_size=64, ffn=864, vocab=1003, tied=False),
    "no grouping": dict(heads=4, kv_heads=4),
    "head size 80": dict(heads=2, kv_heads=1, head_size=80, width=160),
    "head size 20": dict(heads=5, kv_heads=5, head_size=20, width=96, types={"default": "Q4_0", "o": "F16"}),
    "linear rope": dict(rope={"theta": 10000.0, "linear": 4.0}),
    "yarn rope": dict(architecture="qwen2", rope={"theta": 10000.0, "yarn": {"factor": 4.0, "original_context": 32}}),
    "llama3 rope": dict(rope=LLAMA3_ROPE),
    "Q4_1": dict(types="Q4_1"), "Q5_0": dict(types="Q5_0"), "Q5_1": dict(types="Q5_1"), "Q8_0": dict(types="Q8_0"),
    "Q4_K": dict(types="Q4_K", width=256, ffn=512), "Q5_K": dict(types="Q5_K", width=256, ffn=512),
    "Q6_K": dict(types="Q6_K", width=256, ffn=512),
    "F32": dict(types="F32", width=100, heads=5, head_size=20, kv_heads=5, ffn=130),
    "F16": dict(types="F16"), "BF16": dict(types="BF16"),
    "mixed": dict(types={"default": "Q4_K", "v": "Q6_K", "down": "Q5_0", "o": "F16", "token_embd": "Q8_0"},
                  width=256, ffn=512),
}


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 300, TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_decode_follow_the_reference(name, tmp_path, ids):
    path = write_model(tmp_path / "m.gguf", **MODELS[name])
    with Driver(path, kv="fp16") as driver:
        want = ReferenceModel.load(driver.file).forward(ids)
        prompt, decoded = driver.prompt(ids), driver.decode(ids)
    spread = want.std()
    for got in (prompt, decoded):
        assert np.isfinite(got).all()
        assert divergence(want, got) < BOUND * max(1, spread ** 2)
        assert np.abs(got - want).max() < 0.25 * spread


def test_int8_kv_costs_little(tmp_path, ids):
    path = write_model(tmp_path / "m.gguf")
    with Driver(path, kv="int8") as driver:
        want = ReferenceModel.load(driver.file).forward(ids)
        assert divergence(want, driver.decode(ids)) < BOUND
        assert divergence(want, driver.prompt(ids)) < BOUND


@pytest.mark.parametrize("kv", ["int8", "fp16"])
def test_a_prompt_gives_the_same_logits_however_it_is_cut(kv, tmp_path, ids):
    path = write_model(tmp_path / "m.gguf")
    with Driver(path, kv=kv) as driver:
        whole = driver.prompt(ids)
        for cuts in ((64,), (17,), (1, 2, 65, 89)):
            assert np.array_equal(driver.prompt(ids, cuts), whole), cuts


def test_a_row_does_not_depend_on_what_else_is_in_the_step(tmp_path):
    seed = 5
    print("seed", seed)
    rng = np.random.default_rng(seed)
    path = write_model(tmp_path / "m.gguf")
    with Driver(path, threads=2) as driver:
        histories = [rng.integers(0, 300, n) for n in (3, 70, 130, 1)]
        tables = [driver.table() for _ in histories]
        for table, history in zip(tables, histories):
            driver.run(driver.slice(table, history, True))
        copies = [t.fork() for t in tables]
        tokens = rng.integers(0, 300, 4)
        alone = [driver.run(driver.slice(t, tokens[i:i + 1], False)) for i, t in enumerate(tables)]
        prompt = rng.integers(0, 300, 40)
        prompt_alone = driver.run(driver.slice(driver.table(), prompt, True))
        together = driver.run(driver.slice(copies[0], tokens[:1], False), driver.slice(driver.table(), prompt, True),
                              *(driver.slice(copies[i], tokens[i:i + 1], False) for i in (1, 2, 3)))
        want = np.concatenate([alone[0], prompt_alone, *alone[1:]])
        assert np.array_equal(together, want)


def test_threads_do_not_change_results(tmp_path, ids):
    path = write_model(tmp_path / "m.gguf")
    results = []
    for threads in (1, 2, 3):
        with Driver(path, threads=threads) as driver:
            results.append((driver.prompt(ids), driver.decode(ids[:20])))
    for prompt, decoded in results[1:]:
        assert np.array_equal(prompt, results[0][0])
        assert np.array_equal(decoded, results[0][1])


def test_logits_and_hidden_states_of_the_rows_that_asked(tmp_path, ids):
    path = write_model(tmp_path / "m.gguf")
    with Driver(path) as driver:
        from edge_runtime.devices.base import Step
        every = driver.prompt(ids[:10])
        a, b, c = (driver.slice(driver.table(), ids[:10], True, logits, hidden)
                   for logits, hidden in (("last", False), ("none", True), ("all", True)))
        result = driver.device.run(Step((a, b, c)))
        assert np.array_equal(result.logits, np.concatenate([every[-1:], every]))
        reference = ReferenceModel.load(driver.file)
        assert result.hidden is not None and result.hidden.shape == (20, driver.config.width)
        assert np.array_equal(result.hidden[:10], result.hidden[10:])
        head = reference.forward(ids[:10])
        table = driver.file.floats("token_embd.weight") if driver.config.tied_head else None
        assert table is not None
        logits = result.hidden[:10] @ table.reshape(driver.config.vocab_size, -1).T
        assert np.abs(logits - head).max() < 0.2 * head.std()


def test_bad_steps_are_refused_and_the_next_works(tmp_path, ids):
    path = write_model(tmp_path / "m.gguf")
    with Driver(path, max_rows=16) as driver:
        with pytest.raises(DeviceError, match="17 rows"):
            driver.run(driver.slice(driver.table(), ids[:17], True))
        for bad in (-1, 300):
            with pytest.raises(TokenizerError, match=str(bad)):
                driver.run(driver.slice(driver.table(), np.array([1, bad]), True))
        assert driver.run().shape == (0, 300)
        assert np.isfinite(driver.prompt(ids[:16])).all()


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets_in_a_process_of_their_own(isa):
    """The whole of this file's parity under a forced instruction set."""
    if os.environ.get("EDGE_RUNTIME_ISA"):
        pytest.skip("already under a forced instruction set")
    environment = {**os.environ, "EDGE_RUNTIME_ISA": isa}
    chosen = "llama or qwen2 or qwen3 or head or Q4_1 or Q5_1 or Q8_0 or Q5_K or Q6_K or cut or step"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"({chosen}) and not process",
                           "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True, timeout=600,
                          check=False)
    assert done.returncode == 0, done.stdout[-3000:]
