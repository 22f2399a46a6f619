"""The caller's end of a request on asyncio: mailbox, async iterator, and waiting for many.

A step may bring a token to each of many requests. Waking an event loop costs more than making a token of a small model,
so the engine's thread wakes it once for all outcomes that it has not yet taken (`_Bridge`).
"""
from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from edge_runtime.engine import Engine
from edge_runtime.generation import POLL_SECONDS, join
from edge_runtime.outcome import Chunk, Reply
from edge_runtime.request import Outcome, Request


class _Bridge:
    """From engine threads to one event loop: mailboxes that have something, woken together."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._ready: deque[AsyncMailbox] = deque()
        self._called = False
        self._watch: asyncio.TimerHandle | None = None
        self.waiting: set[AsyncMailbox] = set()

    @classmethod
    def of_running_loop(cls) -> _Bridge:
        loop = asyncio.get_running_loop()
        found = _bridges.get(id(loop))
        if found is None:
            found = _bridges[id(loop)] = cls(loop)
        return found

    def wake(self, mailbox: AsyncMailbox) -> None:
        """Called by an engine's thread. Raises RuntimeError where the loop is closed."""
        self._ready.append(mailbox)
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def watch(self) -> None:
        """Look now and then whether the engines of those who wait are alive."""
        if self._watch is None:
            self._watch = self._loop.call_later(5 * POLL_SECONDS, self._check)

    def _deliver(self) -> None:
        self._called = False  # first: who comes from here on calls again
        while self._ready:
            self._ready.popleft().wake()

    def _check(self) -> None:
        self._watch = None
        for mailbox in [*self.waiting]:
            mailbox.check()
        if self.waiting:
            self.watch()


# Weak in the bridges, which hold their loops: a loop lives no longer than the mailboxes on it, and while it lives no
# other has its id.
_bridges: weakref.WeakValueDictionary[int, _Bridge] = weakref.WeakValueDictionary()


class AsyncMailbox:
    """Where the engine's thread puts outcomes and one task of an event loop takes them."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._bridge = _Bridge.of_running_loop()
        self._items: deque[tuple[Request, Outcome]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, request: Request, outcome: Outcome) -> None:
        """Called by the engine's thread."""
        self._items.append((request, outcome))
        try:
            self._bridge.wake(self)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._engine.cancel(request)

    async def take(self) -> list[tuple[Request, Outcome]]:
        """All outcomes that have come, at least one. Raises `EngineStoppedError` when none can come any more."""
        while not self._items:
            await self._wait()
        taken = []
        while self._items:
            taken.append(self._items.popleft())
        return taken

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def check(self) -> None:
        try:
            self._engine.check_alive()
        except Exception as error:
            if self._waiter is not None and not self._waiter.done() and not self._items:
                self._waiter.set_exception(error)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        self._bridge.waiting.add(self)
        self._bridge.watch()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._bridge.waiting.discard(self)


class AsyncGeneration(AsyncIterator[Chunk]):
    """A reply while it is written; `reply` is the whole, once the iteration has ended.

    interval: seconds between two chunks at least, 0 for every token as it comes; for what the engine computes from now
    on. The first chunk and the last never wait. Tokens that came together are one chunk.
    """

    def __init__(self, engine: Engine, request: Request, mailbox: AsyncMailbox):
        self._engine, self._request, self._mailbox = engine, request, mailbox
        self._chunks: list[Chunk] = []
        self._ended = False
        self._error: BaseException | None = None
        self.reply: Reply | None = None

    @property
    def interval(self) -> float:
        return self._request.interval

    @interval.setter
    def interval(self, seconds: float) -> None:
        self._request.interval = seconds

    async def __anext__(self) -> Chunk:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._ended:
            raise StopAsyncIteration
        try:
            taken = await self._mailbox.take()
        except BaseException:
            await self.aclose()
            raise
        chunks = [outcome for _, outcome in taken if isinstance(outcome, Chunk)]
        if isinstance(taken[-1][1], BaseException):
            self._ended, self._error = True, taken[-1][1]
            if not chunks:
                return await self.__anext__()
        self._chunks += chunks
        if chunks[-1].finish_reason is not None:
            self._ended, self.reply = True, join(self._chunks)
        return chunks[0] if len(chunks) == 1 else _merged(chunks)

    def cancel(self) -> None:
        """End the reply after the step that runs now: one more chunk comes, with finish_reason "cancelled"."""
        self._engine.cancel(self._request)

    async def aclose(self) -> None:
        """Cancel, and take no more chunks."""
        self._close()

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self.cancel()


def _merged(chunks: list[Chunk]) -> Chunk:
    last = chunks[-1]
    logprobs = None if last.logprobs is None else tuple(p for chunk in chunks for p in chunk.logprobs or ())
    return Chunk("".join([chunk.text for chunk in chunks]), tuple([t for chunk in chunks for t in chunk.token_ids]),
                 last.finish_reason, logprobs, last.stats, tuple([t for chunk in chunks for t in chunk.token_times]))


async def all_outcomes(engine: Engine, requests: list[Request], mailbox: AsyncMailbox) -> list[Any]:
    """Outcomes in the order of the requests; when the task is cancelled, so are they."""
    outcomes: dict[int, Any] = {}
    try:
        for request in requests:
            engine.submit(request)
        while len(outcomes) < len(requests):
            for request, outcome in await mailbox.take():
                outcomes[request.index] = outcome
    finally:
        for request in requests:
            if not request.finished:
                engine.cancel(request)
    return [outcomes[i] for i in range(len(requests))]
