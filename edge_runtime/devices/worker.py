"""The accelerator's thread: what is submitted runs there in order; it can be pinned to processors of its own."""
from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from edge_runtime.errors import EngineStoppedError

T = TypeVar("T")


class Worker:
    """cores: processors that the thread may run on, all where empty (systems without thread affinity ignore it)."""

    def __init__(self, name: str, cores: tuple[int, ...] = ()):
        self._queue: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._cores, self._closed = cores, False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether the caller is the thread itself."""
        return threading.current_thread() is self._thread

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise EngineStoppedError("the device was closed")
            self._queue.put((future, function))
        return future

    def close(self) -> None:
        """After what was submitted; waits for it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if not self.here:
            self._thread.join()

    def _loop(self) -> None:
        if self._cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._cores)  # 0: this thread
        while True:
            work = self._queue.get()
            if work is None:
                return
            future, function = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del work, future, function  # a value may hold device memory
