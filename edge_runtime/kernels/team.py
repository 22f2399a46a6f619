"""A team of threads that walks a program: a list of (kernel, operands), with a barrier where the next one waits.

A whole step of a model is one call without the GIL. Between steps the threads spin for a moment, so that the next
step finds them awake, and then sleep.
"""
from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.errors import DeviceError
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.memory import (
    LINE,
    aligned,
    call_kernel,
    fetch_add,
    i64_at,
    load_acquire,
    pause,
    store_release,
    yield_processor,
)

WORDS = LINE // 8
# Words of the team's state, each on a line of its own; a line per thread follows for "it sleeps" and "last epoch".
EPOCH, ARRIVED, GENERATION, PROGRAM, LENGTH, STOP, THREADS = (i * LINE for i in range(7))
SLEEPS = THREADS + LINE
PATIENCE = 4000  # turns of a waiting loop (some 20 us) before the processor is offered to others
IDLE_TURNS = 60_000  # turns (about 1 ms) a worker waits for the next step before it sleeps


@dataclass(frozen=True)
class Operation:
    """kernel: its address; operands: an int64 block whose first word the team sets to a zeroed counter; barrier: the
    next operation may start only when all threads have finished this one. name: for listings."""

    name: str
    kernel: int
    operands: np.ndarray
    barrier: bool = True


class Program:
    """Operations as the team reads them. Keeps its operand blocks alive."""

    def __init__(self, operations: Sequence[Operation]):
        self.operations = tuple(operations)
        self.counters = aligned(max(1, len(operations)) * WORDS, np.int64)
        self.table = aligned(max(1, len(operations)) * 4, np.int64)
        for i, operation in enumerate(self.operations):
            operation.operands[0] = self.counters.ctypes.data + i * LINE
            self.table[4 * i:4 * i + 3] = (operation.kernel, operation.operands.ctypes.data, operation.barrier)
        self.address = self.table.ctypes.data


def make_barrier() -> Callable:
    from numba import njit

    def barrier(state, threads):
        generation = load_acquire(state + GENERATION)
        if fetch_add(state + ARRIVED, 1) == threads - 1:
            store_release(state + ARRIVED, 0)
            store_release(state + GENERATION, generation + 1)
        else:
            turns = 0
            while load_acquire(state + GENERATION) == generation:
                turns += 1
                pause()
                if turns > PATIENCE:
                    yield_processor()

    return njit(inline="always")(barrier)


def make_run() -> Callable:
    """Runs the program that the state names, as thread `thread` of `threads`."""
    barrier = make_barrier()

    def run(state, thread, threads):
        program, length = i64_at(state + PROGRAM, 0), i64_at(state + LENGTH, 0)
        for i in range(length):
            entry = program + 32 * i
            call_kernel(i64_at(entry, 0), i64_at(entry, 1), thread, threads)
            if threads > 1 and i64_at(entry, 2) != 0:
                barrier(state, threads)
        if threads > 1:
            barrier(state, threads)

    return run


def make_worker() -> Callable:
    """Runs programs as they come; returns when there was none for a while, or at STOP."""
    from numba import njit

    run = njit(make_run())

    def worker(state, thread, threads):
        mine = state + SLEEPS + thread * 2 * LINE
        seen = i64_at(mine + LINE, 0)
        turns = 0
        while True:
            epoch = load_acquire(state + EPOCH)
            if epoch != seen:
                if load_acquire(state + STOP) != 0:
                    return
                seen, turns = epoch, 0
                store_release(mine + LINE, seen)
                run(state, thread, threads)
                continue
            turns += 1
            pause()
            if turns > IDLE_TURNS:
                store_release(mine, 1)
                if load_acquire(state + EPOCH) == seen:
                    return
                store_release(mine, 0)

    return worker


class Team:
    """`threads` threads, the caller's included. `run(program)` is for one caller at a time."""

    def __init__(self, threads: int | None = None, progress: Progress | None = None):
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= 1024:
            raise DeviceError(f"threads={self.threads}: must be 1 to 1024")
        self._state = aligned((SLEEPS // 8) + 2 * WORDS * self.threads, np.int64)
        self._at = self._state.ctypes.data
        signature = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)
        self._run = signature(compile_kernel(f"team run {current().name}", make_run, progress))
        self._worker = signature(compile_kernel(f"team worker {current().name}", make_worker, progress))
        self._wake = [threading.Semaphore(0) for _ in range(self.threads)]
        self._workers: list[threading.Thread] = []
        self._process = os.getpid()
        self._closed = False

    def run(self, program: Program) -> None:
        """Walks the program with all threads and returns when it is done. Releases the GIL."""
        if self._closed:
            raise DeviceError("the thread team is closed")
        if self.threads > 1 and (not self._workers or self._process != os.getpid()):
            self._start()
        program.counters[:] = 0
        state = self._state
        state[PROGRAM // 8], state[LENGTH // 8] = program.address, len(program.operations)
        if self.threads > 1:
            self._signal()
        self._run(self._at, 0, self.threads)

    def _signal(self) -> None:
        self._state[EPOCH // 8] += 1
        _full_fence()
        for thread in range(1, self.threads):
            if self._state[(SLEEPS + thread * 2 * LINE) // 8]:
                self._state[(SLEEPS + thread * 2 * LINE) // 8] = 0
                self._wake[thread].release()

    def _start(self) -> None:
        """Threads start when there is first something to run, and again in a forked child, which has none."""
        self._process = os.getpid()
        self._state[:] = 0
        self._wake = [threading.Semaphore(0) for _ in range(self.threads)]
        self._workers = [threading.Thread(target=self._loop, args=(t, self._wake[t]), name=f"edge-runtime-{t}",
                                          daemon=True) for t in range(1, self.threads)]
        for worker in self._workers:
            worker.start()

    def _loop(self, thread: int, wake: threading.Semaphore) -> None:
        while not self._state[STOP // 8]:
            self._worker(self._at, thread, self.threads)
            if self._state[STOP // 8]:
                return
            wake.acquire()

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._workers and self._process == os.getpid():
            self._state[STOP // 8] = 1
            self._state[EPOCH // 8] += 1
            for semaphore in self._wake[1:]:
                semaphore.release()
            for worker in self._workers:
                worker.join(timeout=5)


def default_threads() -> int:
    """Processors this process may run on, hyper-threads not counted where psutil can tell."""
    import psutil

    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


_fence_lock = threading.Lock()


def _full_fence() -> None:
    """Orders the store of the epoch before the loads of who sleeps: taking a lock is a locked instruction."""
    with _fence_lock:
        pass
