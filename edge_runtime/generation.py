"""The caller's end of a request: wait for its outcome, iterate over its chunks, cancel it."""
from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

from edge_runtime.engine import Engine
from edge_runtime.outcome import Chunk, Reply
from edge_runtime.request import Outcome, Request

POLL_SECONDS = 0.2  # how long a death of the engine's thread may go unnoticed


class Mailbox:
    """Where the engine's thread puts outcomes and another thread takes them."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._queue: queue.SimpleQueue[tuple[Request, Outcome]] = queue.SimpleQueue()

    def put(self, request: Request, outcome: Outcome) -> None:
        self._queue.put((request, outcome))

    def take(self) -> tuple[Request, Outcome]:
        """The next outcome. Raises `EngineStoppedError` when none can come any more."""
        while True:
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._queue.empty():
                    self._engine.check_alive()


class Generation(Iterator[Chunk]):
    """A reply while it is written: iterate over its chunks, `cancel` it from any thread, or drop it, which cancels it
    too. `reply` is the whole, once the iteration has ended."""

    def __init__(self, engine: Engine, request: Request, mailbox: Mailbox, on_end: Any = None):
        self._engine, self._request, self._mailbox, self._on_end = engine, request, mailbox, on_end
        self._chunks: list[Chunk] = []
        self._ended = False
        self.reply: Reply | None = None

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        try:
            _, outcome = self._mailbox.take()
        except BaseException:
            self.close()
            raise
        if isinstance(outcome, BaseException):
            self._end()
            raise outcome
        assert isinstance(outcome, Chunk)
        self._chunks.append(outcome)
        if outcome.finish_reason is not None:
            self.reply = join(self._chunks)
            self._end()
        return outcome

    def cancel(self) -> None:
        """End the reply after the step that runs now: one more chunk comes, with finish_reason "cancelled"."""
        self._engine.cancel(self._request)

    def close(self) -> None:
        """Cancel, and take no more chunks."""
        if not self._ended:
            self.cancel()  # first: what follows on the same session must come after it
            self._end()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _end(self) -> None:
        self._ended = True
        if self._on_end is not None:
            self._on_end(self.reply)
            self._on_end = None


def join(chunks: list[Chunk]) -> Reply:
    """The reply that `chunks`, all of them, make."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.stats is not None
    logprobs = None if last.logprobs is None else tuple(p for chunk in chunks for p in chunk.logprobs or ())
    return Reply("".join(chunk.text for chunk in chunks), tuple(t for chunk in chunks for t in chunk.token_ids),
                 last.finish_reason, logprobs, last.stats,
                 token_times=tuple(t for chunk in chunks for t in chunk.token_times))
