"""Where a sequence's KV lies, in which mode it runs and when it moves changes no token: against the device alone."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime.devices.onnx import PROVIDERS, OnnxAccelerator, OnnxDevice
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload import hybrid_device
from edge_runtime.offload.choices import Mode
from edge_runtime.offload.hybrid_device import HybridDevice
from tests.devices.conformance import Subject
from tests.gguf_factory import LLAMA3_ROPE, write_model
from tests.offload.generations import LENGTHS, TOKENS, Generations, Opened, compare
from tests.offload.scripted import DEVICE, HOST, Place, Placed

MODES = [Mode.SYNCHRONOUS, Mode.PIPELINED, Mode.OVERLAP, Mode.STREAMING]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("placements") / "m.gguf", layers=3, rope=LLAMA3_ROPE)


@pytest.fixture(scope="module")
def half(path) -> Iterator[Opened]:
    opened = Opened(path, "fp16")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def byte(path) -> Iterator[Opened]:
    opened = Opened(path, "int8")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def page_by_page(monkeypatch):
    monkeypatch.setattr(hybrid_device, "BRING_TOKENS", 64)


def test_whole_graphs_and_segments_of_the_provider_give_the_reference(path):
    with GGUFFile(path) as file:
        for form in ("whole", "segments"):
            device = OnnxDevice(OnnxAccelerator(file, config_from_gguf(file), kv_budget_bytes=16 << 20, forms=(form,)),
                                form)
            generations = Generations(device, file)
            reference = generations.subject.reference
            want = [reference.forward(history)[n - 1:] for history, n in zip(generations.histories, LENGTHS)]
            compare(want, generations.logits(), 1e-4, 2e-4)
            device.close()


def test_rounding_keys_and_values_to_halves_stays_near_the_reference(half):
    generations = Generations(half.device, half.file)
    want = [generations.subject.reference.forward(h)[n - 1:] for h, n in zip(generations.histories, LENGTHS)]
    compare(want, half.want, 4e-3, 8e-3)


def test_halves_by_the_type_and_by_arithmetic(path, monkeypatch):
    """Keys and values are halves of what they would be; without the type but for ties, of which a few come up."""
    with GGUFFile(path) as file:
        config, found = config_from_gguf(file), []
        for half_kv, half in ((False, True), (True, True), (True, False)):
            monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], half=half))
            a = OnnxAccelerator(file, config, kv_budget_bytes=1 << 20, half_kv=half_kv)
            ids = np.arange(200)
            found.append(a.submit(lambda a=a, ids=ids: a.segment(0, a.embed(ids), None, ids)[1].array.copy()).result())
            a.close()
    plain, typed, computed = found
    kv = slice(config.q_width, None)
    assert np.array_equal(typed[:, kv], plain[:, kv].astype(np.float16).astype(np.float32))
    assert np.array_equal(typed[:, :config.q_width], plain[:, :config.q_width])
    usual = np.abs(plain[:, kv]) > 2.0**-14
    assert (computed[:, kv] == typed[:, kv])[usual].mean() > 0.999
    assert np.abs(computed - plain).max() <= np.abs(plain).max() * 2.0**-11


@pytest.mark.parametrize("mode", MODES)
def test_every_placement_in_every_mode(half, mode):
    assert half.check(mode, lambda key, tokens: HOST).ran[DEVICE] == 0
    assert half.check(mode, lambda key, tokens: DEVICE).ran[HOST] == 0
    mixed = half.check(mode, lambda key, tokens: (HOST, DEVICE)[key % 2]).ran
    assert mixed[HOST] and mixed[DEVICE]


def test_device_only_waits_for_what_is_not_there(half):
    ran = half.check(Mode.DEVICE_ONLY, lambda key, tokens: DEVICE).ran
    assert ran == {HOST: 0, DEVICE: len(LENGTHS) * TOKENS, "split": 0}


@pytest.mark.parametrize("at", [64, 128, 192])
def test_split_between_both(half, at):
    ran = half.check(Mode.SYNCHRONOUS, lambda key, tokens: at if tokens > at else HOST).ran
    assert ran["split"] and ran[HOST]
    half.check(Mode.SYNCHRONOUS, lambda key, tokens: (at if tokens > at else HOST, DEVICE, HOST)[key % 3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("places", [(DEVICE, HOST), (HOST, DEVICE)])
def test_kv_moves_before_any_token(half, mode, places):
    starts = dict(enumerate(LENGTHS, 1))  # keys count from 1
    for point in range(1, TOKENS):
        half.check(mode, lambda key, tokens, point=point: places[tokens - starts[key] > point])


@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_kv_moves_at_random_in_modes_at_random(kv, request):
    opened = request.getfixturevalue("half" if kv == "fp16" else "byte")
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(6):
        modes = [MODES[i] for i in rng.integers(0, len(MODES), 64)]
        ran = opened.check(lambda lap, modes=modes: modes[lap % 64], Wandering(rng)).ran
        assert all(ran.values())


class Wandering:
    """Anywhere for each token, and there until the token has come."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.places = rng, dict[tuple[int, int], Place]()

    def __call__(self, key: int, tokens: int) -> Place:
        choices: list[Place] = [HOST, DEVICE, *(n for n in (64, 128) if n < tokens)]
        return self.places.setdefault((key, tokens), choices[int(self.rng.integers(len(choices)))])


@pytest.mark.parametrize("mode", MODES)
def test_int8_pages_keep_their_gap(byte, mode):
    byte.check(mode, lambda key, tokens: HOST)
    byte.check(mode, lambda key, tokens: (HOST, DEVICE)[(key + tokens // 3) % 2])


def test_a_prompt_in_chunks_attends_now_here_now_there(path):
    """While another sequence has the rest of the device's pool, a copy cannot grow and the next chunks go to the
    host."""
    with GGUFFile(path) as file:
        config = config_from_gguf(file)
        accelerator = OnnxAccelerator(file, config, kv_budget_bytes=1 << 20, half_kv=True)
        accelerator.kv.budget_bytes = accelerator.kv.bytes_for(512)
        device = HybridDevice(accelerator, config, Placed(Mode.SYNCHRONOUS, lambda key, tokens: HOST), kv="fp16",
                              host_threads=2)
        s = Subject(device, file)
        ids = np.random.default_rng(5).integers(0, 260, 330)
        want = s.reference.forward(ids)
        table, other = s.table(), s.table()
        held = []
        for start, stop in ((0, 60), (60, 150), (150, 151), (151, 330)):
            if start == 60:
                s.prompt(ids[:300], other)
            elif start == 151:
                s.release(other)
            found = s.run(s.slice(table, ids[start:stop])).logits
            held.append(device._copies.tokens(s.key(table), stop))
            assert np.abs(found - want[start:stop]).max() < 4e-3
        assert held == [60, 60, 60, 330]
        device.close()
