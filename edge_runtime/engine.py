"""The loop: schedule, run, sample, emit. One thread owns the device and the KV; the others queue and receive."""
from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import TypeVar

import numpy as np

from edge_runtime.batching import Batcher, DraftPart, Schedule
from edge_runtime.devices.base import Device, Draft, Drafted, StepResult
from edge_runtime.early_exit import ExitState
from edge_runtime.errors import DeviceError, EdgeRuntimeError, EngineStoppedError, NumericalError, OutOfMemoryError
from edge_runtime.offload.kv_cache import KVCache
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import pages_for
from edge_runtime.pace import Pace
from edge_runtime.request import Request
from edge_runtime.sequence import Sequence, Wants
from edge_runtime.speculation import DraftControl

T = TypeVar("T")
IDLE_SECONDS = 1.0  # after this long without work the KV's empty slabs go back to the system


class Engine:
    """Runs requests on a device until it is closed.

    A device that raises fails the requests of that step; a thread that dies fails all, and the next `submit` starts
    another with an empty KV cache. `kv_budget_bytes` bounds the pages, `context` the tokens of one sequence.
    """

    def __init__(self, device: Device, *, kv_budget_bytes: int, context: int, end_ids: frozenset[int] = frozenset(),
                 max_batch: int = 64, salt: bytes = b""):
        self.device, self.context, self.end_ids = device, context, end_ids
        self.max_batch = max_batch
        self._kv_budget_bytes, self._salt = kv_budget_bytes, salt
        self._requests: dict[Sequence, Request] = {}  # those that the batcher knows
        self._open: dict[int, Request] = {}  # those whose outcome is still owed
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.steps = 0
        self._reset()
        self._atexit = _close_at_exit(self)

    # What other threads call

    def submit(self, request: Request) -> None:
        """Queue a request; its outcome goes to its sink. Starts the thread where none runs."""
        if request.wants is Wants.KV and request.conversation is None:
            request.finish("length")
            return
        needed = pages_for(len(request.prompt_ids) + 1)
        if needed > self.cache.pool.capacity:
            raise OutOfMemoryError(
                f"{len(request.prompt_ids)} prompt tokens need {needed} KV pages, the KV budget of "
                f"{self._kv_budget_bytes / 2**20:.0f} MiB holds {self.cache.pool.capacity}. Give the KV more memory.")
        self._post(lambda: self._accept(request), request)

    def cancel(self, request: Request) -> None:
        """End a request as soon as the step that runs now is over."""
        request.cancelled = True
        if not self._closed:
            self._inbox.put(lambda: self._cancel(request))

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps, and wait for its value."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

        self._post(run)
        while True:
            try:
                return future.result(timeout=0.2)
            except FutureTimeout:
                if future.done():
                    raise
                self.check_alive()

    def check_open(self) -> None:
        """Raise `EngineStoppedError` where it was closed."""
        if self._closed:
            raise EngineStoppedError()

    def check_alive(self) -> None:
        """Raise `EngineStoppedError` when no thread would serve a waiting request."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            raise EngineStoppedError() if self._closed else _died("its thread ended")

    def close(self, timeout: float | None = None) -> None:
        """Fail what is still running, after the current step, and end the thread. Then the device may be closed."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._inbox.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        if thread is None or not thread.is_alive():
            self._fail_all(EngineStoppedError())
        atexit.unregister(self._atexit)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    # The engine's thread

    def step(self) -> bool:
        """One round for all running sequences; False when there is nothing to do."""
        began = time.perf_counter()
        schedule = self.batcher.schedule()
        for seq, error in schedule.failed:
            self._end(self._requests[seq], error)
        if not schedule.parts and not schedule.drafts:
            return bool(schedule.failed)
        result = self._run(schedule) if schedule.parts else None
        if result is not None:
            done = schedule if result.finished is None else schedule.only(result.finished)
            self.batcher.commit(done)
            self._sample(done, result)
        layers = {part.sequence.exit.plan.draft_layer for part in schedule.drafts if part.sequence.exit}
        for layer in sorted(layers):
            size = self._speculate(layer, [part for part in schedule.drafts
                                           if part.sequence.exit and part.sequence.exit.plan.draft_layer == layer])
            if size is not None and len(layers) == 1 and not schedule.parts:
                # The whole round: what it costs besides the device is saved by longer drafts too.
                self.drafting.note(layer, *size, seconds=time.perf_counter() - began)
        self.steps += 1
        return True

    def _run(self, schedule: Schedule) -> StepResult | None:
        now = time.perf_counter()
        for part in schedule.parts:
            request = self._requests[part.sequence]
            request.started = request.started or now
        try:
            step = schedule.step
            result = self.device.run(step)
            self.pace.note(schedule.prompt_rows, time.perf_counter() - now)
            if result.finished is not None:
                step = schedule.only(result.finished).step
            if result.logits.shape != (step.logit_rows, self.device.vocab_size):
                raise DeviceError(f"the device returned logits of shape {result.logits.shape} for {step.logit_rows} "
                                  f"rows and a vocabulary of {self.device.vocab_size}")
            return result
        except Exception as error:
            for part in schedule.parts:
                self._end(self._requests[part.sequence], _device_error(error))
            return None

    def _sample(self, schedule: Schedule, result: StepResult) -> None:
        row = state = 0
        for part in schedule.parts:
            seq, request = part.sequence, self._requests[part.sequence]
            logits = result.logits[row] if part.logits else None
            decoded = logits is not None and part.count == 1 and seq.length > seq.prompt_length
            if seq.exit is not None and decoded and result.exits is not None:
                seq.exit.note(int(result.exits[row]), seq.table.length - 1)
            row += part.logits
            reason: str | BaseException | None = None
            try:
                if seq.wants is Wants.HIDDEN:
                    assert result.hidden is not None
                    request.pool(result.hidden[state:state + part.count])
                    state += part.count
                    reason = None if seq.pending else "stop"
                elif seq.wants is Wants.SCORE:
                    request.score_tokens(result.logits[row:row + part.count], seq.table.length - part.count)
                    row += part.count
                    reason = None if seq.pending else "stop"
                elif seq.wants is Wants.KV:
                    reason = None if seq.pending else "length"
                elif logits is not None:
                    reason = request.draw(logits, self.end_ids)
            except Exception as error:
                reason = error
            if reason is not None:
                self._end(request, reason)
            elif logits is not None:
                request.emit_chunk()

    def _speculate(self, layer: int, parts: list[DraftPart]) -> tuple[int, int, int] | None:
        """Draft and check; every token of the reply is drawn from the full model's logits. Returns the most drafts
        asked for, how many sequences drafted together, and the most rows that one ran; None where the device failed."""
        drafts = []
        together = len(parts)
        rows_each = max(0, self.device.max_rows // together - 1)
        for part in parts:
            seq, request = part.sequence, self._requests[part.sequence]
            assert seq.exit is not None
            most = min(part.most, rows_each, request.limit - len(request.token_ids) - 1)
            most = self.drafting.choose(seq.exit.acceptance, together, most)
            drafts.append(Draft(int(seq.tokens[-1]), seq.table.length, seq.table.addresses, most,
                                seq.exit.plan.stop_below))
        try:
            found = self.device.speculate(layer, drafts)  # type: ignore[attr-defined]
        except Exception as error:
            for part in parts:
                self._end(self._requests[part.sequence], _device_error(error))
            return None
        rows = max(len(one.logits) for one in found)
        for part, one, draft in zip(parts, found, drafts):
            self._take_drafts(self._requests[part.sequence], one, draft.most)
        return max(draft.most for draft in drafts), together, rows

    def _take_drafts(self, request: Request, found: Drafted, asked: int) -> None:
        seq = request.sequence
        assert seq is not None and seq.exit is not None
        reason: str | BaseException | None = None
        accepted, before = 0, len(request.token_ids)
        try:
            for at, logits in enumerate(found.logits):
                reason = request.draw(logits, self.end_ids)
                if reason is not None or at == len(found.tokens) or request.token_ids[-1] != found.tokens[at]:
                    break
                accepted += 1
        except Exception as error:
            reason = error
        seq.table.advance(accepted + 1)
        seq.exit.note_drafts(len(found.logits), accepted, len(request.token_ids) - before, asked)
        if reason is not None:
            self._end(request, reason)
        else:
            request.emit_chunk()

    def _accept(self, request: Request) -> None:
        if request.finished:  # it was failed when an earlier thread ended
            return
        if request.cancelled:
            self._finish(request, "cancelled")
            return
        seq = Sequence(request.prompt_ids, self._table_for(request), self.cache.root,
                       priority=request.priority, wants=request.wants)
        request.sequence = seq
        if request.exit is not None:
            width = getattr(self.device, "state_width", 0)
            seq.exit = ExitState(request.exit, width, self.device.max_rows // self.batcher.max_batch - 1)
        request.limit = self.context - seq.length
        if request.params.max_tokens is not None:
            request.limit = min(request.limit, request.params.max_tokens)
        self._requests[seq] = request
        self.batcher.add(seq)

    def _leaving(self, seq: Sequence) -> None:
        """A device that keeps something of a sequence lets go of it before its pages do."""
        forget = getattr(self.device, "forget", None)
        if forget is not None:
            forget(seq.key)

    def _cancel(self, request: Request) -> None:
        if request.sequence in self._requests:
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: str | BaseException) -> None:
        seq = request.sequence
        assert seq is not None
        del self._requests[seq]
        self.batcher.remove(seq)
        if isinstance(reason, NumericalError):
            self.cache.index.forget(seq.page_keys())  # NaN in shared KV would reach every later request
        if request.conversation is not None and not isinstance(reason, BaseException):
            request.conversation.tokens = seq.tokens.copy()
            if seq.exit is not None:  # what follows in the session stands on a full model's KV
                seq.table.truncate(seq.exit.exact_tokens(seq.table.length))
            request.conversation.table = seq.table
            self.cache.park(seq.table)
        else:
            seq.table.release()
        self._finish(request, reason)

    def _finish(self, request: Request, reason: str | BaseException) -> None:
        self._open.pop(id(request), None)
        if isinstance(reason, BaseException):
            request.fail(reason)
        else:
            request.finish(reason)

    def _table_for(self, request: Request) -> PageTable:
        """A session's own table, cut back to what its tokens share with the prompt; else an empty one."""
        conversation = request.conversation
        table = conversation.table if conversation is not None else None
        if conversation is None or table is None or not self.cache.owns(table):
            return self.cache.table()
        count = min(table.length, len(conversation.tokens), len(request.prompt_ids) - 1)
        differs = np.flatnonzero(conversation.tokens[:count] != request.prompt_ids[:count])
        self.cache.unpark(table)
        table.truncate(int(differs[0]) if len(differs) else count)
        self.cache.park(table)  # it may still be reclaimed while the request waits
        return table

    def _loop(self) -> None:
        end = EngineStoppedError()
        try:
            while self._receive():
                if not self.step():
                    time.sleep(0)  # nobody may run in this round: let other threads change that
        except BaseException as error:
            end = _died(f"its thread ended with {type(error).__name__}{f': {error}' if str(error) else ''}")
        finally:
            with self._lock:
                self._thread = None
                self._fail_all(end)

    def _receive(self) -> bool:
        """Run what other threads asked for; waits while there is nothing else to do. False to end."""
        idle = self.batcher.idle
        while True:
            try:
                command = self._inbox.get(timeout=IDLE_SECONDS) if idle else self._inbox.get_nowait()
            except queue.Empty:
                if not idle:
                    return True
                self.cache.pool.trim()
                continue
            if command is None:
                return False
            command()
            idle = False

    def _post(self, command: Callable[[], None], request: Request | None = None) -> None:
        with self._lock:
            if self._closed:
                raise EngineStoppedError()
            if self._thread is None or not self._thread.is_alive():
                self._fail_all(_died("its thread ended"))
                self._reset()
                self._thread = threading.Thread(target=self._loop, name="edge-runtime-engine", daemon=True)
                self._thread.start()
            if request is not None:
                self._open[id(request)] = request
            self._inbox.put(command)

    def _reset(self) -> None:
        """An empty KV cache: nobody knows what a thread that died left behind in the old one."""
        self.cache = KVCache(self.device.kv_layout, self._kv_budget_bytes, self._salt)
        self.batcher = Batcher(self.cache, self.device.max_rows, self.max_batch,
                               uniform=getattr(self.device, "uniform", False), leaving=self._leaving)
        self.pace = Pace(self.batcher)
        self.drafting = DraftControl()

    def _fail_all(self, error: EngineStoppedError) -> None:
        for seq in self._requests:
            with suppress(Exception):  # a device of which nothing is known any more
                self._leaving(seq)
        self._requests.clear()
        while self._open:
            self._open.popitem()[1].fail(error)


def _died(cause: str) -> EngineStoppedError:
    return EngineStoppedError(cause, "Its requests are lost; the next one starts it again.")


def _device_error(error: Exception) -> EdgeRuntimeError:
    if isinstance(error, EdgeRuntimeError):
        return error
    wrapped = DeviceError(f"The device failed in a step: {type(error).__name__}: {error}. The requests of that step "
                          f"end; the engine goes on.")
    wrapped.__cause__ = error
    return wrapped


def _close_at_exit(engine: Engine) -> Callable[[], None]:
    """End the thread before the interpreter takes its modules away; a step that hangs does not hold up the exit."""
    reference = weakref.ref(engine)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close(timeout=2.0)

    return atexit.register(close)
