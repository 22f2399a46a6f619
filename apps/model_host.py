"""The models a program offers, and the one that is open: found by name, leased to requests, switched with progress."""
from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import EngineStoppedError, InvalidRequestError, ModelNotFoundError, NotPulledError
from edge_runtime.models import hub
from edge_runtime.progress import PROFILING

if TYPE_CHECKING:
    from edge_runtime.llm import LLM
    from edge_runtime.offload.plan import Plan

BUNDLED = "edge-tiny"
POLL_SECONDS = 0.02  # how often a request looks whether a switch of models is over
LOOK_SECONDS = 0.1  # how often the memory that loading has filled is looked at

Progress = Callable[["LoadProgress"], object]
Finder = Callable[[], Iterable[tuple[str, Path]]]


@dataclass(frozen=True)
class KnownModel:
    """name: what requests call it; source: "bundled", "file" or "pulled"; size_bytes: of the file; created: its time
    of change, seconds since 1970."""

    name: str
    path: Path
    source: str
    size_bytes: int
    created: int


@dataclass(frozen=True)
class LoadProgress:
    """Where loading a model is. stage: "plan" (it fits; nothing is loaded), "close" (waiting for requests on the model
    before), "load", "compile" (detail: the kernel), "measure" (what this machine takes for the model; detail: which
    part) or "ready"; fraction: of the weights in memory, estimated, 0 to 1."""

    model: str
    stage: str
    fraction: float = 0.0
    detail: str = ""
    plan: Plan | None = None


class UnknownModelError(InvalidRequestError):
    """A request names a model that this program does not have."""


class ModelHost:
    """Holds one open LLM. Safe from many threads and event loops.

    models: GGUF files offered beside the bundled model; the first is opened unless `default` names another. pulled:
    called for further (name, path) each time the list is asked for; None: those that `edge-runtime pull` has fetched.
    options: of `LLM` (device, context, kv, threads, max_batch, memory_budget). drain_seconds: how long a switch waits
    for requests that run on the model before; then they end with EngineStoppedError. Nothing is opened before `load`,
    `get` or `lease`.
    """

    def __init__(self, models: Iterable[str | os.PathLike[str]] = (), *, default: str | None = None,
                 pulled: Finder | None = None, drain_seconds: float = 60.0, **options: Any):
        self._given: dict[str, KnownModel] = {}
        self._pulled, self._options, self.drain_seconds = pulled or pulled_models, options, drain_seconds
        self._state = threading.Lock()
        self._loading = threading.Lock()
        self._loader = _loader()
        self._llm: LLM | None = None
        self._current: str | None = None
        self._switching = False
        self._leases = 0
        self._closed = self._fixed = False
        for path in models:
            self.add(path)
        self.default = default or next(iter(self._given), BUNDLED)
        self.known(self.default)

    @classmethod
    def of(cls, llm: LLM, name: str) -> ModelHost:
        """A host of one LLM that is open already, and whose owner it becomes."""
        host = cls.__new__(cls)
        host._given = {name: KnownModel(name, Path(name), "file", 0, int(time.time()))}
        host._pulled, host._options, host.drain_seconds = tuple, {}, 60.0
        host._state, host._loading, host._loader = threading.Lock(), threading.Lock(), _loader()
        host._llm, host._current, host._switching, host._leases, host._closed = llm, name, False, 0, False
        host._fixed, host.default = True, name  # it opens nothing else
        return host

    # What there is

    def models(self) -> list[KnownModel]:
        """Files given first, then those pulled, then the bundled model."""
        found = dict(self._given)
        for name, path in self._pulled():
            if name not in found:
                with contextlib.suppress(OSError):
                    found[name] = _known(name, path, "pulled")
        if not self._fixed and BUNDLED not in found:
            from edge_runtime.models import bundled

            with contextlib.suppress(OSError):
                found[BUNDLED] = _known(BUNDLED, bundled.path(), "bundled")
        return list(found.values())

    def known(self, name: str) -> KnownModel:
        """By its name here, or another that means a pulled file: `org/repo` where `org/repo:Q4_0` is listed. Raises
        UnknownModelError."""
        models = self.models()
        for model in models:
            if model.name == name:
                return model
        if not self._fixed and hub.is_name(name):
            with contextlib.suppress(NotPulledError, InvalidRequestError):
                path = hub.path_of(name)
                return next((model for model in models if model.path == path), _known(name, path, "pulled"))
        raise UnknownModelError("model", name, f"one of {', '.join(model.name for model in models)}")

    def add(self, path: str | os.PathLike[str]) -> KnownModel:
        """Offer one more GGUF file, under its name without suffix, or a pulled model by its name. Raises
        ModelNotFoundError."""
        file = Path(path).expanduser()
        if not file.exists() and hub.is_name(file.as_posix()):
            path = hub.path_of(file)
            name = next((listed for listed, where in self._pulled() if where == path), file.as_posix())
            return self._given.setdefault(name, _known(name, path, "pulled"))
        if not file.is_file():
            raise ModelNotFoundError(file, "no such file")
        for model in self._given.values():
            if model.path == file:
                return model
        name, number = file.stem, 2
        while name in self._given or name == BUNDLED:
            name, number = f"{file.stem}-{number}", number + 1
        self._given[name] = _known(name, file, "file")
        return self._given[name]

    @property
    def current(self) -> str | None:
        """Name of the open model."""
        return self._current

    @property
    def llm(self) -> LLM | None:
        """The open model, if one is."""
        return self._llm

    @property
    def switching(self) -> bool:
        """Whether a model is being loaded now."""
        return self._switching

    def plan(self, name: str) -> Plan:
        """What a model would need, with nothing loaded: memory that the open model would give back counts as free.
        Raises OutOfMemoryError (its `plan` is the plan) where it does not fit, and what opening the file raises."""
        from edge_runtime.llm import LLM

        known = ("device", "context", "kv", "max_batch", "memory_budget", "offload", "device_memory", "tbt_ms")
        options = {key: value for key, value in self._options.items() if key in known}
        if options.get("memory_budget") is None and self._llm is not None and self._llm.plan is not None:
            from edge_runtime.offload.plan import MIB, memory

            total, available = memory()
            freed = self._llm.plan.base_bytes
            there = self._llm.plan.on_device
            if there is not None and not there.shared and options.get("device_memory") is None:
                options["device_memory"] = there.memory_bytes
            options["memory_budget"] = max(1, available + freed - max(total // 20, 256 * MIB))
        return LLM.plan_for(self.known(name).path, **options)

    # The open one

    def load(self, name: str | None = None, progress: Progress | None = None) -> LLM:
        """Open a model (None: the default), closing the one before. Blocks; see `get` for asyncio. Where the plan says
        that it does not fit, the one before stays open; where loading itself fails, none is.

        Raises UnknownModelError, and what `LLM` raises."""
        name = name or self.default
        tell = progress or (lambda _: None)
        with self._loading:
            self._check_open()
            if name == self._current and self._llm is not None and not self._llm.closed:
                return self._llm
            model = self.known(name)
            plan = self.plan(name)
            tell(LoadProgress(name, "plan", plan=plan))
            self._switching = True
            try:
                if self._llm is not None:
                    tell(LoadProgress(name, "close", plan=plan))
                self._close_current()
                self._check_open()  # it may have been closed while requests ended
                llm = self._open(model, plan, tell)
                with self._state:
                    self._llm, self._current = llm, name
            finally:
                self._switching = False
            tell(LoadProgress(name, "ready", 1.0, plan=plan))
            return llm

    async def get(self, name: str | None = None, progress: Progress | None = None) -> LLM:
        """`load` on asyncio: the LLM of that name, opened if it is not. A later switch may close it under a caller that
        holds no lease."""
        found = self._llm
        if found is not None and name in (None, self._current) and not found.closed:
            return found
        return await asyncio.get_running_loop().run_in_executor(self._loader, self.load, name, progress)

    @contextlib.asynccontextmanager
    async def lease(self, name: str | None = None) -> AsyncIterator[LLM]:
        """The LLM of that name for the length of one request: no switch closes it meanwhile."""
        if name is not None and name != self._current:
            self.known(name)
        while True:
            llm = self._take(name or self._current or self.default)
            if llm is not None:
                break
            if self._switching:
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self.get(name)
        try:
            yield llm
        finally:
            with self._state:
                self._leases -= 1

    @property
    def leases(self) -> int:
        """Requests that hold the open model now."""
        return self._leases

    def close(self) -> None:
        """Close the open model; requests that still run end with EngineStoppedError."""
        self._closed = True
        with self._loading:
            with self._state:
                llm, self._llm, self._current = self._llm, None, None
            if llm is not None:
                llm.close()

    def _take(self, name: str) -> LLM | None:
        with self._state:
            if self._switching or self._llm is None or name != self._current or self._llm.closed:
                return None
            self._leases += 1
            return self._llm

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStoppedError("the host was closed")

    def _close_current(self) -> None:
        deadline = time.monotonic() + self.drain_seconds
        while self._leases and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        with self._state:
            llm, self._llm, self._current = self._llm, None, None
        if llm is not None:
            llm.close()

    def _open(self, model: KnownModel, plan: Plan, tell: Progress) -> LLM:
        from edge_runtime.llm import LLM

        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(model.name, plan, tell, done), daemon=True)
        watcher.start()
        try:
            return LLM(model.path, progress=lambda what: tell(_told(model.name, what, plan)), **self._options)
        finally:
            done.set()
            watcher.join()


def _loader() -> ThreadPoolExecutor:
    """A thread for switches alone: they wait for requests that run, and these need asyncio's own threads to get on."""
    return ThreadPoolExecutor(1, "edge-model-loader")


def _told(name: str, what: str, plan: Plan) -> LoadProgress:
    """What `LLM` tells its progress."""
    measured = what.removeprefix(PROFILING)
    return LoadProgress(name, "compile" if measured == what else "measure", 0, measured, plan)


def pulled_models() -> list[tuple[str, Path]]:
    """Name and path of the models that were pulled from a hub."""
    from edge_runtime.models.hub_cache import installed

    return [(model.name, model.path) for model in installed()]


def _known(name: str, path: Path, source: str) -> KnownModel:
    stat = path.stat()
    return KnownModel(name, path, source, stat.st_size, int(stat.st_mtime))


def _watch(name: str, plan: Plan, tell: Progress, done: threading.Event) -> None:
    """Tell the share of the weights that is in memory, from what the process has grown by."""
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    tell(LoadProgress(name, "load", 0.0, plan=plan))
    while not done.wait(LOOK_SECONDS):
        share = (process.memory_info().rss - before) / max(1, plan.weights_bytes)
        tell(LoadProgress(name, "load", min(0.99, max(0.0, share)), plan=plan))
