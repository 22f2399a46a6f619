"""Threads that ask a backend, so many at once that its batch stays full."""
from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.backend import Backend
from edge_runtime.apps.summarizer.report import Totals
from edge_runtime.errors import CancelledError

JOIN_SECONDS = 30.0  # for requests that cannot be stopped in their middle; the threads are daemons


@dataclass(frozen=True)
class Done:
    """An ask's outcome: one of answer and error."""

    ask: Ask
    answer: Answer | None
    error: BaseException | None


class Workers:
    """`depth` asks at most lie here, running or waiting their turn."""

    def __init__(self, backend: Backend, totals: Totals):
        self.backend, self.totals = backend, totals
        self.depth = 2 * backend.slots
        self.running = 0
        self._asks: queue.SimpleQueue[Ask | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def room(self) -> bool:
        return self.running < self.depth

    def put(self, ask: Ask) -> None:
        self.running += 1
        if len(self._threads) < min(self.running, self.depth):
            thread = threading.Thread(target=self._work, name="summarize", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._asks.put(ask)

    def take(self, timeout: float) -> list[Done]:
        """What is done: waits for the first, up to `timeout` seconds."""
        found = []
        try:
            found.append(self._done.get(timeout=timeout))
            while True:
                found.append(self._done.get_nowait())
        except queue.Empty:
            pass
        self.running -= len(found)
        return found

    def cancel(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """Cancel what runs, and wait for it."""
        self._stop.set()
        for _ in self._threads:
            self._asks.put(None)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        while (ask := self._asks.get()) is not None:
            ticked = 0

            def tick(tokens: int) -> None:
                nonlocal ticked
                ticked += tokens
                self.totals.tick(tokens)

            try:
                if self._stop.is_set():
                    raise CancelledError("cancelled")
                answer = self.backend.ask(ask, self._stop, tick)
                self.totals.answered(answer, ticked)
                self._done.put(Done(ask, answer, None))
            except BaseException as error:
                self.totals.tick(-ticked)  # they come again, or never
                self._done.put(Done(ask, None, error))
