"""The model picker's side of the server: what there is, whether it fits, loading with progress, where the KV lives."""
from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from edge_runtime.apps.chat import settings
from edge_runtime.apps.chat.errors import NotFoundError
from edge_runtime.apps.chat.events import Hub
from edge_runtime.apps.chat.store import Store
from edge_runtime.apps.model_host import BUNDLED, LoadProgress, ModelHost
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError, OutOfMemoryError


class Models:
    """Over a ModelHost: tells the hub how loading goes, and remembers files and the choice for the next start."""

    def __init__(self, host: ModelHost, store: Store, hub: Hub):
        self.host, self._store, self._hub = host, store, hub
        self._plans: dict[tuple[str, int], dict[str, Any]] = {}
        self._state: dict[str, Any] = {"state": "empty", "name": None}
        self._guard = threading.Lock()
        self.asked: str | None = None  # a model that the command line named
        for path in settings.get(store)["models"]:
            try:
                host.add(path)
            except EdgeRuntimeError:  # it was moved: it is listed again when it is back
                continue

    @property
    def state(self) -> dict[str, Any]:
        """{state: empty, loading, ready or failed; name; stage, fraction, detail; error; context, device, bundled}"""
        return dict(self._state)

    def listed(self) -> list[dict[str, Any]]:
        current = self.host.current
        return [{"name": model.name, "path": str(model.path), "source": model.source, "bytes": model.size_bytes,
                 "current": model.name == current} for model in self.host.models()]

    def plan(self, name: str) -> dict[str, Any]:
        """The fit estimate: {fits, needed, available, context, rows, message}; error where the file cannot be run."""
        model = self.host.known(name)
        key = (str(model.path), model.created)
        if key in self._plans and name != self.host.current:
            return self._plans[key]
        try:
            found, message = self.host.plan(name), ""
        except OutOfMemoryError as error:
            if error.plan is None:
                return {"name": name, "error": str(error)}
            found, message = error.plan, str(error).splitlines()[0]  # type: ignore[assignment]
        except EdgeRuntimeError as error:
            return {"name": name, "error": str(error)}
        self._plans[key] = {
            "name": name, "fits": not message, "message": message, "needed": found.needed_bytes,
            "available": found.available_bytes, "context": found.context, "rows": found.rows()}
        return self._plans[key]

    def add(self, path: str) -> dict[str, Any]:
        """Offer a GGUF file from now on. Raises ModelNotFoundError, InvalidRequestError."""
        try:
            file = Path(path.strip().strip('"')).expanduser()
            usable = bool(path.strip()) and not (file.is_file() and file.suffix.lower() != ".gguf")
        except (OSError, RuntimeError):  # a name too long, a home of nobody
            usable = False
        if not usable:
            raise InvalidRequestError("path", path, "the path of a .gguf file")
        model = self.host.add(file.absolute())
        known = settings.get(self._store)["models"]
        if str(model.path) not in known:
            settings.put(self._store, {"models": [*known, str(model.path)]})
        return {"name": model.name}

    def remembered(self) -> str | None:
        """The model that was asked for, else that of last time, where it is still there."""
        if self.asked is not None:
            return self.asked
        name = settings.get(self._store)["model"]
        return name if any(model.name == name for model in self.host.models()) else None

    async def load(self, name: str | None = None, *, remember: bool = False) -> None:
        """Open a model; how it goes is told to the hub. Does not raise: the state says what went wrong."""
        name = name or self.host.default
        try:
            self.host.known(name)
        except EdgeRuntimeError:
            raise NotFoundError("model", name) from None
        self._tell({"state": "loading", "name": name, "stage": "plan", "fraction": 0.0, "detail": ""})
        try:
            await asyncio.to_thread(self.host.load, name, self._progress)
        except (EdgeRuntimeError, OSError, MemoryError) as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._tell({"state": "failed", "name": name, "error": message, "open": self.host.current})
            return
        if remember:
            settings.put(self._store, {"model": name})
        self.ready()

    def ready(self) -> None:
        """Tell the pages about the model that is open."""
        llm, name = self.host.llm, self.host.current
        if llm is not None:
            plan = llm.plan
            self._tell({"state": "ready", "name": name, "context": llm.context, "bundled": name == BUNDLED,
                        "device": plan.device if plan else "", "kv_dtype": plan.kv if plan else ""})

    def count(self, text: str) -> int | None:
        """Tokens of a text for the open model; None while there is none."""
        llm = self.host.llm
        return None if llm is None or llm.closed else len(llm.tokenize(text, add_special=False))

    def kv(self) -> dict[str, Any] | None:
        """Where the KV lives, in bytes, and what computes: {device, host, budget, mode, on, planned, lost}. lost: how
        many devices another one took over from since the model was opened on `planned`; `on` works now."""
        llm = self.host.llm
        if llm is None or llm.closed:
            return None
        status = llm.status()
        mode = {"whole-model": "host only" if status.kv_home == "host" else "device only"}.get(status.mode, status.mode)
        planned = llm.plan.device if llm.plan else "cpu"
        return {"device": status.device_kv_bytes, "host": status.host_kv_bytes,
                "budget": status.host_kv_budget + status.device_kv_budget, "mode": mode, "planned": planned,
                "on": status.placement.device if status.placement else planned,
                "lost": status.placement.lost if status.placement else 0}

    def _progress(self, progress: LoadProgress) -> None:
        if progress.stage != "ready":
            self._tell({"state": "loading", "name": progress.model, "stage": progress.stage,
                        "fraction": progress.fraction, "detail": progress.detail,
                        "needed": progress.plan.needed_bytes if progress.plan else 0})

    def _tell(self, state: dict[str, Any]) -> None:
        with self._guard:
            self._state = state
        self._hub.publish("model", state)
