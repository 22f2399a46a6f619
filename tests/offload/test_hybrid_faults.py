"""Devices that are lost, fail or run out of memory in the middle of generations; threads that fail; engines that
die."""
from __future__ import annotations

import logging
import random
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import SamplingParams
from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.errors import DeviceError, DeviceLostError, EngineStoppedError, OutOfMemoryError
from edge_runtime.offload import hybrid_device
from edge_runtime.offload.allowance import CALM, Allowance
from edge_runtime.offload.choices import Mode
from edge_runtime.offload.pages import PAGE_TOKENS
from tests.devices.conformance import Subject
from tests.edge_runtime.test_engine import kill
from tests.gguf_factory import write_model
from tests.offload.faulty import KV, Hybrid, hybrid
from tests.offload.scripted import DEVICE, HOST, Placed

MODES = [Mode.SYNCHRONOUS, Mode.PIPELINED, Mode.OVERLAP, Mode.STREAMING]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, 260, n)] for i, n in enumerate((5, 70, 130, 1))]
POINTS = 6  # of failure, for each mode


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("faults") / "m.gguf", layers=3)


@pytest.fixture(autouse=True)
def page_by_page(monkeypatch):
    monkeypatch.setattr(hybrid_device, "BRING_TOKENS", 64)


def wandering(mode: Mode) -> Placed:
    """Host, device, and on the way between them; in synchronous laps split too."""
    def where(key: int, tokens: int):
        if mode is Mode.SYNCHRONOUS and key % 3 == 0:
            return 64 if tokens > 64 else HOST
        return (HOST, DEVICE)[(key + tokens // 4) % 2]

    return Placed(mode, where)


def generate(h: Hybrid) -> None:
    """All come to their end with the reference's tokens, and leave nothing behind."""
    for prompt, reply in zip(PROMPTS, h.llm.generate(PROMPTS, GREEDY)):
        assert reply.finish_reason == "length", reply.error
        assert len(reply.token_ids) == GREEDY.max_tokens
        h.check(prompt, reply.token_ids)
    h.settled()


@pytest.fixture(params=MODES)
def machine(request, path):
    with hybrid(path, wandering(request.param)) as found:
        generate(found)
        found.accelerator.calls.clear()
        generate(found)  # with cached prompts, as those that follow
        yield found


def points(calls: list[str]) -> list[int]:
    """Where to fail: at any call of any kind."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng, kinds = random.Random(seed), sorted(set(calls))
    chosen = [rng.choice(kinds) for _ in range(POINTS)]
    return [rng.choice([at for at, name in enumerate(calls) if name == kind]) for kind in chosen]


def test_a_lost_device_is_replaced_and_no_token_changes(machine, caplog):
    calls = list(machine.accelerator.calls)
    assert {"segment", "attend", "head", "open"} <= set(calls)
    for point in points(calls):
        broken, before = machine.accelerator, machine.device.status().lost
        broken.fail_at(point, DeviceLostError("the cable came loose."))
        with caplog.at_level(logging.WARNING, logger="edge_runtime"):
            generate(machine)
        assert machine.device.status().lost == before + broken.lost
        assert ("the cable came loose. onnx:cpu goes on with the same sequences" in caplog.text) == broken.lost
        caplog.clear()
    assert machine.device.status().lost


def test_devices_lost_one_after_the_other(path):
    with hybrid(path, wandering(Mode.SYNCHRONOUS)) as h:
        opened = h.opened

        def doomed():
            found = opened()
            found.fault = lambda name, n, arguments: DeviceLostError("another one") if name == "head" else None
            return found

        h.accelerator.fault = lambda name, n, arguments: DeviceLostError("the first") if name == "head" else None
        h.opened = doomed
        replies = h.llm.generate(PROMPTS, GREEDY)
        assert all(isinstance(reply.error, DeviceLostError) for reply in replies)
        h.opened = opened
        generate(h)


def test_where_no_other_device_takes_over_the_requests_end_and_the_engine_lives(path):
    with hybrid(path, wandering(Mode.OVERLAP), reopens=0) as h:
        generate(h)
        h.accelerator.fail_at(60, DeviceLostError("gone"))
        replies = h.llm.generate(PROMPTS, GREEDY)
        assert any(reply.finish_reason == "error" for reply in replies)
        for reply in replies:
            if reply.finish_reason == "error":
                assert isinstance(reply.error, DeviceLostError)
                assert "gone. No other device takes over: no other device is plugged in" in str(reply.error)
        with pytest.raises(DeviceLostError):
            h.llm.generate(PROMPTS[0], GREEDY)
        h.reopens = 1  # now one is
        generate(h)
        assert h.device.status().lost == 1


def test_a_device_that_fails_once_ends_the_requests_of_that_step(machine):
    for point in points(machine.accelerator.calls):
        before = len(machine.accelerator.calls)
        machine.accelerator.fail_at(point, DeviceError("a bad moment"))
        replies = machine.llm.generate(PROMPTS, GREEDY)
        failed = [reply for reply in replies if reply.finish_reason == "error"]
        assert bool(failed) == (len(machine.accelerator.calls) > before + point)
        assert all(isinstance(reply.error, DeviceError) and "bad moment" in str(reply.error) for reply in failed)
        for prompt, reply in zip(PROMPTS, replies):
            machine.check(prompt, reply.token_ids)
        machine.settled()
    machine.accelerator.fault = None
    generate(machine)


def test_out_of_memory_anywhere_in_a_step_loses_no_sequence(machine, caplog):
    for point in points(machine.accelerator.calls):
        before, at = machine.device.status().short, len(machine.accelerator.calls) + point
        machine.accelerator.fail_at(point, OutOfMemoryError("full"))
        with caplog.at_level(logging.WARNING, logger="edge_runtime"):
            generate(machine)
        failed = machine.accelerator.calls[at:at + 1]
        # To open or grow a copy in vain only says that there is no room.
        short = bool(failed) and failed[0] not in ("open", "grow")
        assert machine.device.status().short == before + short
        assert ("out of memory in a step" in caplog.text) == short
        caplog.clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*KV, "attend"])
def test_a_device_that_never_has_memory_for_kv_leaves_it_to_the_host(path, mode, name):
    with hybrid(path, wandering(mode)) as h:
        h.accelerator.fault = lambda call, n, arguments: OutOfMemoryError("full") if call == name else None
        generate(h)
        if name in ("open", "attend"):
            assert h.device.apex.ran[HOST]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("most", [1, 3, 50])
def test_steps_shrink_to_what_the_device_takes(path, mode, most):
    with hybrid(path, wandering(mode)) as h:
        h.accelerator.fault = lambda name, n, arguments: (
            OutOfMemoryError("full") if name == "segment" and len(arguments[3]) > most else None)
        generate(h)
        hidden = h.llm.embed("some words that are cut into pieces " * 3)
        h.accelerator.fault = None
        h.device._allowance.rows = None
        assert np.abs(hidden - h.llm.embed("some words that are cut into pieces " * 3)).max() < 4e-3


def test_a_device_that_takes_nothing_at_all_is_an_error_until_it_does(path):
    with hybrid(path, wandering(Mode.SYNCHRONOUS)) as h:
        h.accelerator.fault = lambda name, n, arguments: OutOfMemoryError("full") if name == "segment" else None
        replies = h.llm.generate(PROMPTS, GREEDY)
        assert all(isinstance(reply.error, OutOfMemoryError) for reply in replies)
        h.accelerator.fault = None
        generate(h)


def test_one_row_without_kv_on_the_device_is_run_once_more(path, caplog):
    with hybrid(path, Placed(Mode.SYNCHRONOUS, lambda key, tokens: HOST), device_kv=1) as h:
        errors = [OutOfMemoryError("full")]
        h.accelerator.fault = lambda name, n, arguments: (
            errors.pop() if errors and name == "head" and h.accelerator.calls.count("head") == 3 else None)
        with caplog.at_level(logging.WARNING, logger="edge_runtime"):
            h.check(PROMPTS[0], h.llm.generate(PROMPTS[0], GREEDY).token_ids)
        assert not errors and "it is run once more" in caplog.text and h.device.status().short == 1


def test_what_was_taken_away_comes_back_after_a_calm_while():
    allowed = Allowance(512)
    assert "1500 tokens" in allowed.shrink(300, held=3000, again=False) and allowed.rows is None
    assert "0 tokens" in allowed.shrink(300, held=1000, again=True)
    assert "150 rows" in allowed.shrink(300, held=0, again=True) and allowed.rows == 150
    for rows in (75, 37, 18, 9, 4, 2, 1):
        assert allowed.shrink(300, held=0, again=True) and allowed.rows == rows
    assert not allowed.shrink(300, held=0, again=True)
    seen = []
    for _ in range(12 * CALM):
        allowed.worked(4096)
        seen.append((allowed.rows, allowed.tokens))
    assert seen[CALM - 2] == (1, 0) and seen[CALM - 1] == (2, 512) and seen[2 * CALM - 1] == (4, 1024)
    assert seen[-1] == (None, None)


@pytest.mark.parametrize("broken", ["_run", "_stored"])
def test_a_failure_on_the_hosts_threads_ends_the_requests_of_that_step(machine, broken, monkeypatch):
    host = machine.device._host if broken == "_run" else machine.device._writer
    works, left = getattr(host, broken), [7]

    def fails(*arguments):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("a bit fell over")
        return works(*arguments)

    monkeypatch.setattr(host, broken, fails)
    replies = machine.llm.generate(PROMPTS, GREEDY)
    if left[0] <= 0:
        assert any(isinstance(reply.error, DeviceError) and "bit fell over" in str(reply.error) for reply in replies)
    for prompt, reply in zip(PROMPTS, replies):
        machine.check(prompt, reply.token_ids)
    monkeypatch.undo()
    machine.settled()
    generate(machine)


@pytest.mark.parametrize("mode", [Mode.DEVICE_ONLY, *MODES])
def test_a_pool_of_one_byte(path, mode):
    with hybrid(path, Placed(mode, lambda key, tokens: DEVICE), device_kv=1) as h:
        generate(h)
        assert h.device.status().pool_tokens == 0


@pytest.mark.parametrize("mode", [Mode.DEVICE_ONLY, *MODES])
def test_sequences_that_grow_beyond_the_devices_context(path, mode):
    with hybrid(path, Placed(mode, lambda key, tokens: DEVICE if tokens <= 128 else HOST), device_context=128) as h:
        long = [PROMPTS[2][:n] for n in (110, 125, 127, 128)] + [PROMPTS[1] * 3]
        for prompt, reply in zip(long, h.llm.generate(long, SamplingParams(temperature=0, max_tokens=20))):
            h.check(prompt, reply.token_ids)
        h.settled()
        assert h.device.apex.ran[DEVICE] and h.device.apex.ran[HOST]


def test_a_page_that_is_copied_while_its_row_is_under_way(path):
    """A fork makes the next write go elsewhere: the row begins anew in the new page."""
    with hybrid(path, Placed(Mode.OVERLAP, lambda key, tokens: (HOST, DEVICE)[key % 2])) as h:
        s = Subject(h.device, h.file)
        ids = np.random.default_rng(3).integers(0, 260, 80).astype(np.int32)
        here, away = s.table(), s.table()
        for table in (here, away):
            s.prompt(ids[:70], table)
        lane, token = s.slice(here, ids[70:71], prompt=False), s.slice(away, ids[70:71], prompt=False)
        gate = threading.Event()
        h.device._host.call(gate.wait)  # the host is slow
        assert h.device.run(Step((lane, token))).finished == (0,)
        gate.set()
        away.truncate(70)
        fork = away.fork()
        away.reserve(1)  # copies the page
        moved = SequenceSlice(token.token_ids, 70, away.addresses, key=token.key)
        assert moved.pages[70 // PAGE_TOKENS] != fork.addresses[70 // PAGE_TOKENS]
        want = s.reference.forward(ids)
        got = s.run(moved).logits[0]
        away.advance(1)
        assert np.abs(got - want[70]).max() < 4e-3
        for at in range(71, 80):
            got = s.run(s.slice(away, ids[at:at + 1], prompt=False, logits="last")).logits[0]
            assert np.abs(got - want[at]).max() < 4e-3
        for table in (fork, here, away):
            s.release(table)
        assert s.pool.used == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_whose_thread_dies_leaves_nothing_under_way(path, mode):
    with hybrid(path, wandering(mode)) as h:
        for tokens in (1, 3, 6):
            stream = h.llm.stream(PROMPTS[1], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
            with pytest.raises(EngineStoppedError):
                for count, _ in enumerate(stream):
                    if count == tokens:
                        kill(h.llm.engine._thread)
            generate(h)


@pytest.mark.parametrize("mode", MODES)
def test_closing_in_the_middle_of_everything(path, mode):
    h = Hybrid(path, wandering(mode))
    found: list[BaseException | None] = []
    threads = [threading.Thread(target=lambda prompt=prompt: found.append(outcome(h, prompt))) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    while not h.device.status().laps:
        pass
    h.llm.close()
    for thread in threads:
        thread.join(timeout=20)
    assert len(found) == len(PROMPTS) and all(isinstance(error, EngineStoppedError) for error in found)


def outcome(h: Hybrid, prompt: list[int]) -> BaseException | None:
    try:
        h.llm.generate(prompt, SamplingParams(temperature=0, max_tokens=450 - len(prompt), ignore_eos=True))
    except BaseException as error:
        return error
    return None


def test_closing_the_device_while_it_works(path):
    """The step that runs comes to its end, the next one is refused."""
    h = Hybrid(path, wandering(Mode.OVERLAP))
    thread = threading.Thread(target=outcome, args=(h, PROMPTS[1]))
    thread.start()
    while not h.device.status().laps:
        pass
    h.device.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    h.llm.close()
