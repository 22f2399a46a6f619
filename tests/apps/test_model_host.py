"""The host of models: what it knows, how it switches, and that a request keeps its model until it is done."""
from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_runtime.apps.model_host import BUNDLED, ModelHost, UnknownModelError
from edge_runtime.errors import EngineStoppedError, ModelNotFoundError, OutOfMemoryError
from edge_runtime.models import bundled
from tests.gguf_factory import write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"{name}.gguf", width=64) or folder / f"{name}.gguf" for name in ("first", "second")]


@pytest.fixture
def host(files):
    found = ModelHost(files, pulled=lambda: [("org/model:Q4_0", bundled.path())], threads=1, memory_budget=2 << 30)
    yield found
    found.close()


def test_models_by_name(host, files, tmp_path):
    assert [model.name for model in host.models()] == ["first", "second", "org/model:Q4_0", BUNDLED]
    assert [model.source for model in host.models()] == ["file", "file", "pulled", "bundled"]
    assert host.default == "first" and host.current is None and host.llm is None
    assert host.known("second").path == files[1] and host.known(BUNDLED).size_bytes > 1e6
    with pytest.raises(UnknownModelError, match="first, second"):
        host.known("third")
    with pytest.raises(ModelNotFoundError):
        host.add(tmp_path / "missing.gguf")
    assert host.add(files[0]).name == "first"
    other = tmp_path / "first.gguf"
    other.write_bytes(files[0].read_bytes())
    assert host.add(other).name == "first-2"


def test_load_tells_how_far_it_is_and_switches(host):
    seen = []
    llm = host.load(progress=seen.append)
    assert host.current == "first" and host.llm is llm and host.load("first") is llm
    stages = [one.stage for one in seen]
    assert stages[0] == "plan" and stages[-1] == "ready" and "load" in stages and "close" not in stages
    assert seen[0].plan.weights_bytes > 0 and all(0 <= one.fraction <= 1 for one in seen)
    seen.clear()
    assert host.load("second", seen.append) is not llm
    assert llm.closed and host.current == "second" and "close" in [one.stage for one in seen]


def test_what_does_not_fit_leaves_the_open_model_alone(files):
    host = ModelHost(files, pulled=tuple, threads=1, memory_budget=2 << 30)
    try:
        llm = host.load()
        host._options["memory_budget"] = 1 << 20
        with pytest.raises(OutOfMemoryError):
            host.load("second")
        assert host.llm is llm and not llm.closed and not host.switching
    finally:
        host.close()


def test_a_file_that_breaks_while_loading(host, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    host.add(bad)
    host.load()
    with pytest.raises(Exception, match="bad"):
        host.load("bad")
    assert not host.switching and host.load("second").generate("x", max_tokens=1).token_ids


def test_requests_keep_their_model_while_another_is_loaded(host):
    async def run() -> list[str]:
        order = []

        async def use(name: str, seconds: float) -> None:
            async with host.lease(name) as llm:
                order.append(f"{name} in")
                await asyncio.sleep(seconds)
                await llm.agenerate("x", max_tokens=2)
                assert not llm.closed and host.current == name
                order.append(f"{name} out")

        await asyncio.gather(use("first", 0.5), use("first", 0.3), use("second", 0.0), use("second", 0.1))
        return order

    order = asyncio.run(run())
    assert host.leases == 0 and len(order) == 8
    inside = {"first": 0, "second": 0}
    for name, way in (entry.split() for entry in order):  # who comes first is the threads' affair
        inside[name] += 1 if way == "in" else -1
        assert not (inside["first"] and inside["second"]), order


def test_switches_that_wait_leave_requests_their_threads(host):
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))  # a machine of two cores has six; as many switches may wait

        async def ask(name: str) -> str:
            async with host.lease(name) as llm:
                await asyncio.sleep(0.2)  # the others ask meanwhile
                return (await llm.agenerate("a", max_tokens=2, ignore_eos=True)).finish_reason

        names = ["first", "second"] * 4
        assert await asyncio.wait_for(asyncio.gather(*map(ask, names)), 60) == ["length"] * len(names)

    host.drain_seconds = 600
    host.load("first")
    asyncio.run(scenario())
    assert not host.leases


def test_a_switch_that_waits_too_long_ends_what_runs(host):
    host.drain_seconds = 0.1

    async def run() -> None:
        async with host.lease("first") as llm:
            task = asyncio.ensure_future(llm.agenerate("x", max_tokens=None, ignore_eos=True))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(host.load, "second")
            if not task.done():
                with pytest.raises(EngineStoppedError):
                    await task
        assert host.current == "second"

    asyncio.run(run())


def test_close_while_a_switch_waits_opens_nothing_more(host, monkeypatch):
    host.load("first")
    host._leases += 1  # a request that runs
    errors, opened = [], []
    monkeypatch.setattr(host, "_open", lambda *_: opened.append(1))

    def switch() -> None:
        try:
            host.load("second")
        except EngineStoppedError as error:
            errors.append(error)

    threads = [threading.Thread(target=switch)]
    threads[0].start()
    while not host.switching:
        time.sleep(0.01)
    threads.append(threading.Thread(target=host.close))
    threads[1].start()
    while not host._closed:
        time.sleep(0.01)
    host._leases -= 1
    for thread in threads:
        thread.join(30)
    assert len(errors) == 1 and not opened and host.llm is None


def test_close_while_it_loads(host):
    thread = threading.Thread(target=lambda: host.load())
    thread.start()
    time.sleep(0.01)
    host.close()
    thread.join()
    assert host.llm is None or host.llm.closed
    with pytest.raises(EngineStoppedError):
        host.load()
