"""The engine's thread when things go wrong: devices that raise, threads that die, interpreters that exit."""
from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_runtime import SamplingParams
from edge_runtime.errors import DeviceError, EngineStoppedError, NumericalError
from tests.edge_runtime.llms import fake_llm, fake_of, settled
from tests.fake_device import BOS, greedy

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def expected(text: str) -> tuple[int, ...]:
    return tuple(greedy([BOS, *text.encode()], 12))


def kill(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, wherever it is."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def test_a_device_that_raises_fails_the_requests_of_that_step_only():
    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("the cable came loose")

    with fake_llm(fail=fail) as llm:
        replies = llm.generate(["a", "b", "c"], GREEDY)
        assert [r.finish_reason for r in replies] == ["error"] * 3
        assert all(isinstance(r.error, DeviceError) and "cable" in str(r.error) for r in replies)
        assert replies[0].token_ids == expected("a")[:3]  # what was there is not lost
        assert llm.generate("a", GREEDY).token_ids == expected("a")
        settled(llm)


def test_a_single_request_raises_the_devices_error():
    def fail(step: int) -> None:
        if step in (1, 2):
            raise NumericalError("typed errors keep their type") if step == 1 else OSError("disk on fire")

    with fake_llm(fail=fail) as llm:
        with pytest.raises(NumericalError):
            llm.generate("a", GREEDY)
        with pytest.raises(DeviceError, match="disk on fire") as caught:
            list(llm.stream("a", GREEDY))
        assert isinstance(caught.value.__cause__, OSError)
        assert llm.generate("a", GREEDY).token_ids == expected("a")


def test_a_device_that_returns_the_wrong_shape():
    with fake_llm() as llm:
        run = fake_of(llm).run

        def short(step):
            result = run(step)
            return type(result)(result.logits[:, :-1], None)

        fake_of(llm).run = short
        with pytest.raises(DeviceError, match="shape"):
            llm.generate("a", GREEDY)


def test_a_device_that_exits_the_thread_is_noticed_and_the_next_request_runs():
    def fail(step: int) -> None:
        if step == 3:
            raise SystemExit("out of here")

    with fake_llm(fail=fail) as llm:
        with pytest.raises(EngineStoppedError, match="SystemExit"):
            llm.generate(["a", "b"], GREEDY)
        assert llm.generate("a", GREEDY).token_ids == expected("a")
        settled(llm)


def test_a_killed_thread_is_noticed_by_everyone_who_waits():
    with fake_llm(delay=0.002) as llm:
        failures: list[BaseException] = []

        def ask(i: int) -> None:
            try:
                llm.generate(f"request {i}", temperature=0, max_tokens=4000)
            except EngineStoppedError as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
        for thread in threads:
            thread.start()
        stream = llm.stream("streaming", temperature=0, max_tokens=4000)
        next(stream)
        while len(llm.engine._requests) < 11:
            time.sleep(0.001)
        kill(llm.engine._thread)
        for thread in threads:
            thread.join(timeout=5)
        assert len(failures) == 10
        with pytest.raises(EngineStoppedError):
            list(stream)
        assert llm.generate("a", GREEDY).token_ids == expected("a")
        settled(llm)


@pytest.mark.parametrize("attempt", range(8))
def test_killed_again_and_again(attempt):
    with fake_llm() as llm:
        llm.generate("warm", GREEDY)
        for _ in range(3):
            thread = llm.engine._thread
            timer = threading.Timer(0.003 * attempt, lambda thread=thread: kill(thread))
            timer.start()
            with pytest.raises(EngineStoppedError):
                while True:
                    llm.generate([f"request {i}" for i in range(20)], temperature=0, max_tokens=50)
            timer.join()
            assert llm.generate("a", GREEDY).token_ids == expected("a")


def test_a_thread_that_vanishes_without_a_word():
    with fake_llm(delay=0.01) as llm:
        stream = llm.stream("a", temperature=0, max_tokens=4000)
        next(stream)
        engine = llm.engine
        engine._fail_all, kept = (lambda error: None), engine._fail_all
        kill(engine._thread)
        with pytest.raises(EngineStoppedError, match="its thread ended"):
            list(stream)
        engine._fail_all = kept
        assert llm.generate("a", GREEDY).token_ids == expected("a")


def test_call_runs_between_steps_and_hands_errors_back():
    with fake_llm() as llm:
        assert llm.engine.call(lambda: threading.current_thread().name) == "edge-runtime-engine"
        with pytest.raises(ZeroDivisionError):
            llm.engine.call(lambda: 1 / 0)
        with pytest.raises(SystemExit):
            llm.engine.call(lambda: sys.exit(3))
        time.sleep(0.05)
        assert llm.engine.call(lambda: 7) == 7


def test_idle_memory_goes_back():
    with fake_llm() as llm:
        session = llm.session()
        session.append("x" * 3000)
        llm.engine.call(lambda: llm.engine.cache.index.clear())
        session.close()
        deadline = time.monotonic() + 5
        while llm.engine.call(lambda: llm.engine.cache.pool.stats().reserved_bytes) and time.monotonic() < deadline:
            time.sleep(1.05)
        assert llm.engine.call(lambda: llm.engine.cache.pool.stats().reserved_bytes) == 0


def test_engines_do_not_pile_up():
    gc.collect()
    before = threading.active_count()
    for _ in range(20):
        fake_llm().generate("a", GREEDY)
    gc.collect()
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(0)", "raise SystemExit"])
def test_the_interpreter_exits_while_requests_run(ending):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from tests.edge_runtime.llms import fake_llm
llm = fake_llm(delay=0.01)
stream = llm.stream("hello", max_tokens=4000)
print(next(stream).text != "")
{ending}
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_an_engine_of_its_own():
    with fake_llm() as llm:
        llm.generate("parent", GREEDY)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if llm.generate("a", GREEDY).token_ids == expected("a") else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert llm.generate("a", GREEDY).token_ids == expected("a")


def test_a_step_that_hangs_does_not_hold_up_the_exit():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import threading
from tests.edge_runtime.llms import fake_llm, fake_of
llm = fake_llm()
fake_of(llm).gate = threading.Event()
stream = llm.stream("hello")
print("asked")
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "asked\n", done.stderr
    assert time.monotonic() - start < 30
