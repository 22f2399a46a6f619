"""From the source to the output: documents are read ahead, their asks share one batch, results are written in order.

One thread, the caller's, owns ledger, jobs and output; one reads ahead; many wait for the model.
"""
from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.backend import Backend
from edge_runtime.apps.summarizer.errors import JobError
from edge_runtime.apps.summarizer.ledger import Entry, Ledger
from edge_runtime.apps.summarizer.order import InOrder, failure
from edge_runtime.apps.summarizer.outputs import Output
from edge_runtime.apps.summarizer.report import Totals
from edge_runtime.apps.summarizer.sources import Item, Source
from edge_runtime.apps.summarizer.strategies import Job
from edge_runtime.apps.summarizer.workers import Done, Workers
from edge_runtime.errors import (
    CancelledError,
    ChatTemplateError,
    ContextLengthError,
    EdgeRuntimeError,
    EngineStoppedError,
    InvalidRequestError,
    MissingExtraError,
    TokenizerError,
    UnsupportedModelError,
)

ATTEMPTS = 3  # of an ask that may succeed another time
READ_AHEAD = 32  # items between the reader and the model
POLL_SECONDS = 0.2
HOPELESS = (InvalidRequestError, ContextLengthError, TokenizerError, ChatTemplateError, UnsupportedModelError,
            MissingExtraError)


@dataclass(eq=False)
class _Running:
    """A document whose job is under way. missing: answers that it waits for."""

    document: int
    item: Item
    began: float
    job: Job | None = None
    answers: list[Answer | None] = field(default_factory=list)
    missing: int = 0


@dataclass(eq=False)
class _Flight:
    """An ask on its way, and who waits for it: (document, place of the answer). The same is never asked twice at
    once."""

    ask: Ask
    waiters: list[tuple[_Running, int]] = field(default_factory=list)
    attempts: int = 0


class Pipeline:
    """make_job: an item's job; may raise as jobs do. Results are kept in the ledger and written to the output in the
    order of the source."""

    def __init__(self, backend: Backend, source: Source, make_job: Callable[[Item], Job], ledger: Ledger,
                 output: Output, totals: Totals | None = None):
        self.source, self.make_job, self.ledger = source, make_job, ledger
        self.totals = totals or Totals()
        self.workers = Workers(backend, self.totals)
        self.order = InOrder(ledger, output, self.totals, unique_names=source.batch)
        self._flights: dict[bytes, _Flight] = {}
        self._ready: deque[_Flight] = deque()  # those that found no room yet
        self._jobs = 0
        self._waiting = False  # nothing to do before an answer comes
        self._reader = _Reader(source)

    def run(self) -> Generator[Entry, None, None]:
        """Entries in order, as they are sure to be in the output. Raises JobError and what ends all:
        EngineStoppedError, CancelledError. Closing the generator cancels what runs; the ledger keeps what is done."""
        self.order.open()
        self._reader.start()
        try:
            while self._feed() or self._jobs:
                if self._jobs:
                    for done in self.workers.take(POLL_SECONDS if self._waiting else 0.0):
                        self._take(done)
                yield from self.order.drain()
            self.order.end(self._reader.count)
            yield from self.order.drain()
        finally:
            self._reader.close()
            self.workers.close()
            self.totals.ended = time.perf_counter()
            self.order.output.close()

    def cancel(self) -> None:
        """End soon, from any thread: requests stop at their next token."""
        self.workers.cancel()

    # Feeding

    def _feed(self) -> bool:
        """Send what is ready, and start some documents while there is room. False once the source is at its end."""
        started = 0
        self._waiting = True
        while self.workers.room:
            if self._ready:
                flight = self._ready.popleft()
                if any(running.missing for running, _ in flight.waiters):
                    self.workers.put(flight.ask)
                else:  # whoever waited has failed by another ask
                    del self._flights[flight.ask.key]
                continue
            if started == READ_AHEAD:  # many may have been done before, or be bad: let them be written
                self._waiting = False
                break
            item = self._reader.take(wait=not self._jobs and not started)
            if item is None:
                break
            started += 1
            if self.order.admit(*item):
                self._start(*item)
        return not self._reader.ended

    def _start(self, document: int, item: Item) -> None:
        running = _Running(document, item, time.perf_counter())
        self._jobs += 1
        try:
            running.job = self.make_job(item)
            self._ask(running, next(running.job))
        except StopIteration as end:
            self._finish(running, end.value, None)
        except Exception as error:
            self._fail(running, error)

    def _ask(self, running: _Running, asks: list[Ask]) -> None:
        """Answers that the ledger has need no asking."""
        assert running.job is not None
        while True:
            running.answers = [self.ledger.answer(ask) for ask in asks]
            missing = [slot for slot, answer in enumerate(running.answers) if answer is None]
            self.totals.reused += len(asks) - len(missing)
            running.missing = len(missing)
            if missing:
                for slot in missing:
                    flight = self._flights.get(asks[slot].key)
                    if flight is None:
                        flight = self._flights[asks[slot].key] = _Flight(asks[slot])
                        self._ready.append(flight)
                    flight.waiters.append((running, slot))
                return
            asks = running.job.send(running.answers)  # type: ignore[arg-type]

    # Taking

    def _take(self, done: Done) -> None:
        flight = self._flights[done.ask.key]
        if done.answer is None:
            self._failed_ask(flight, done.error)
            return
        del self._flights[done.ask.key]
        self.ledger.record(flight.waiters[0][0].document, done.ask, done.answer)
        for running, slot in flight.waiters:
            if running.missing:  # it has not failed meanwhile
                running.answers[slot] = done.answer
                running.missing -= 1
                if not running.missing:
                    self._go_on(running)

    def _go_on(self, running: _Running) -> None:
        """All answers are there."""
        assert running.job is not None
        try:
            self._ask(running, running.job.send(running.answers))  # type: ignore[arg-type]
        except StopIteration as end:
            self._finish(running, end.value, None)
        except Exception as error:
            self._fail(running, error)

    def _failed_ask(self, flight: _Flight, error: BaseException | None) -> None:
        if isinstance(error, CancelledError | JobError) or not isinstance(error, Exception):
            raise error or CancelledError("cancelled")
        self.ledger.record(flight.waiters[0][0].document, flight.ask, None, " ".join(str(error).split())[:500])
        flight.attempts += 1
        if isinstance(error, EdgeRuntimeError) and not isinstance(error, HOPELESS) and flight.attempts < ATTEMPTS:
            self.totals.retried += 1
            self._ready.appendleft(flight)
        elif isinstance(error, EngineStoppedError):
            raise error  # no document would fare better
        else:
            del self._flights[flight.ask.key]
            for running, _ in flight.waiters:
                if running.missing:
                    self._fail(running, error)

    def _fail(self, running: _Running, error: BaseException) -> None:
        if isinstance(error, JobError | CancelledError):
            raise error
        self._finish(running, None, failure(error, running.item, isinstance(error, HOPELESS)))

    def _finish(self, running: _Running, result: dict | None, error: dict | None) -> None:
        running.missing = 0
        if running.job is not None:
            running.job.close()
        self._jobs -= 1
        self.order.finish(running.document, running.item.name, result, error, time.perf_counter() - running.began)


class _Reader:
    """Reads the source on a thread of its own, a few items ahead."""

    def __init__(self, source: Source):
        self._source = source
        self._items: queue.Queue[tuple[int, Item] | BaseException | None] = queue.Queue(READ_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="summarize-reader", daemon=True)
        self.ended = False
        self.count = 0  # items, once it has ended

    def start(self) -> None:
        self._thread.start()

    def take(self, wait: bool) -> tuple[int, Item] | None:
        """(number, item); None where there is none now, or any more."""
        while not self.ended:
            try:
                found = self._items.get(timeout=POLL_SECONDS) if wait else self._items.get_nowait()
            except queue.Empty:
                if wait:
                    continue
                return None
            if isinstance(found, tuple):
                self.count = found[0] + 1
                return found
            self.ended = True
            if found is not None:
                raise found
        return None

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(POLL_SECONDS * 10)

    def _read(self) -> None:
        last: BaseException | None = None
        try:
            for item in enumerate(self._source):
                if not self._put(item):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: tuple[int, Item] | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
