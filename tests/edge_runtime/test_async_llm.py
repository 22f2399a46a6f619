"""The async twins: same replies, a free event loop, cancelled tasks."""
from __future__ import annotations

import asyncio
import gc
import time
import weakref

import numpy as np
import pytest

from edge_runtime import SamplingParams
from edge_runtime.errors import DeviceError, EngineStoppedError, InvalidRequestError, NumericalError
from tests.edge_runtime.llms import fake_llm, fake_of, settled
from tests.edge_runtime.test_engine import kill

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_same_as_the_sync_calls():
    async def ask(llm):
        one = await llm.agenerate("hello", GREEDY)
        many = await llm.agenerate(["hello", "other"], GREEDY)
        chat = await llm.achat("hi", GREEDY)
        streamed = [chunk async for chunk in llm.astream("hello", GREEDY)]
        generation = await llm.achat("hi", GREEDY, stream=True)
        chatted = [chunk.text async for chunk in generation]
        return one, many, chat, streamed, chatted, generation.reply, await llm.aembed(["a", "b"])

    with fake_llm() as llm:
        one, many, chat, streamed, chatted, reply, vectors = asyncio.run(ask(llm))
        assert one.text == llm.generate("hello", GREEDY).text == many[0].text
        assert "".join(chunk.text for chunk in streamed) == one.text and streamed[-1].finish_reason == "length"
        assert chat.text == llm.chat("hi", GREEDY).text == "".join(chatted) == reply.text
        assert np.array_equal(vectors, llm.embed(["a", "b"]))


def test_many_tasks_share_the_batch_and_the_loop_stays_free():
    async def ask(llm):
        late = []

        async def tick():
            while True:
                start = time.perf_counter()
                await asyncio.sleep(0.005)
                late.append(time.perf_counter() - start)

        ticker = asyncio.create_task(tick())
        replies = await asyncio.gather(*(llm.agenerate(f"p{i}", GREEDY) for i in range(50)))
        ticker.cancel()
        return replies, late

    with fake_llm(delay=0.01) as llm:
        replies, late = asyncio.run(ask(llm))
        assert [r.text for r in replies] == [r.text for r in llm.generate([f"p{i}" for i in range(50)], GREEDY)]
        assert len(late) > 5 and sorted(late)[len(late) // 2] < 0.05
        assert max(map(len, fake_of(llm).sizes)) > 10


def test_cancelling_the_task_cancels_the_request():
    async def ask(llm):
        tasks = [asyncio.create_task(llm.agenerate(["a", "b"], max_tokens=4000)),
                 asyncio.create_task(llm.achat("c", max_tokens=4000)),
                 asyncio.create_task(llm.aembed(["x" * 4000] * 100))]

        async def read():
            async for _ in llm.astream("d", max_tokens=4000):
                pass

        tasks.append(asyncio.create_task(read()))
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results), results
        async for _ in llm.astream("e", max_tokens=4000):
            break

    with fake_llm(delay=0.005) as llm:
        asyncio.run(ask(llm))
        time.sleep(0.05)
        settled(llm)


def test_errors_come_through():
    async def ask(llm):
        with pytest.raises(InvalidRequestError):
            await llm.agenerate("a", temperature=-1)
        with pytest.raises(InvalidRequestError):
            await llm.agenerate(["a"], stream=True)
        with pytest.raises(NumericalError):
            await llm.agenerate("poison", GREEDY)
        with pytest.raises(NumericalError):
            async for _ in llm.astream("poison", GREEDY):
                pass
        replies = await llm.agenerate(["fine", "poison"], GREEDY)
        assert [r.finish_reason for r in replies] == ["length", "error"]

    with fake_llm(poison=lambda history: b"poison" in bytes(history[1:].astype(np.uint8))) as llm:
        asyncio.run(ask(llm))


def test_a_killed_thread_is_noticed():
    async def ask(llm):
        task = asyncio.create_task(llm.agenerate("a", max_tokens=4000))
        await asyncio.sleep(0.05)
        kill(llm.engine._thread)
        with pytest.raises(EngineStoppedError):
            await task
        assert (await llm.agenerate("a", GREEDY)).finish_reason == "length"

    with fake_llm(delay=0.005) as llm:
        asyncio.run(ask(llm))


def test_a_loop_that_closes_early_leaves_nothing_running():
    async def start(llm):
        generation = await llm.agenerate("a", stream=True, max_tokens=4000)
        return await generation.__anext__(), generation

    with fake_llm(delay=0.002) as llm:
        _, generation = asyncio.run(start(llm))
        time.sleep(0.1)
        settled(llm)
        del generation


def test_event_loops_that_ended_are_forgotten():
    loops = []

    async def ask(llm):
        loops.append(weakref.ref(asyncio.get_running_loop()))
        assert [chunk async for chunk in llm.astream("hello", GREEDY)]
        assert await llm.agenerate("hello", GREEDY)

    with fake_llm() as llm:
        for _ in range(3):
            asyncio.run(ask(llm))
        deadline = time.monotonic() + 10  # the engine's thread may still be on its way out of the last request
        while any(loop() is not None for loop in loops) and time.monotonic() < deadline:
            time.sleep(0.05)
            gc.collect()
        assert [loop() for loop in loops] == [None] * 3


def test_async_with_closes():
    async def ask():
        async with fake_llm() as llm:
            device = fake_of(llm)
            await llm.agenerate("a", GREEDY)
        with pytest.raises(EngineStoppedError):
            await llm.agenerate("a", GREEDY)
        return device.closed

    assert asyncio.run(ask())


def test_a_stream_may_come_in_fewer_pieces():
    async def run() -> None:
        with fake_llm(delay=0.002) as llm:
            wanted = llm.generate("pieces", temperature=0, max_tokens=60)
            generation = await llm.agenerate("pieces", temperature=0, max_tokens=60, stream=True)
            generation.interval = 0.05
            chunks = [chunk async for chunk in generation]
            assert "".join(chunk.text for chunk in chunks) == wanted.text
            assert [t for chunk in chunks for t in chunk.token_ids] == list(wanted.token_ids)
            assert len(chunks[0].token_ids) <= 5 and len(chunks) < 30
            assert generation.reply is not None and generation.reply.text == wanted.text

    asyncio.run(run())


def test_an_error_in_a_stream_comes_after_the_text_before_it():
    def fail(step: int) -> None:
        if step == 6:
            raise RuntimeError("broken")

    async def run() -> None:
        with fake_llm(fail=fail) as llm:
            generation = await llm.agenerate("x", temperature=0, max_tokens=60, stream=True)
            generation.interval = 60
            await asyncio.sleep(0.2)
            text = ""
            with pytest.raises(DeviceError):
                async for chunk in generation:
                    text += chunk.text
            assert len(text) == 6
            with pytest.raises(StopAsyncIteration):
                await generation.__anext__()

    asyncio.run(run())
