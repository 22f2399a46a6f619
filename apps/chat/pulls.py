"""Pulling a model from a hub out of the picker: one at a time, with progress, and it can be called off."""
from __future__ import annotations

import asyncio
import time
from typing import Any

from edge_runtime.apps.chat.events import Hub
from edge_runtime.errors import CancelledError, EdgeRuntimeError, InvalidRequestError

TELL_SECONDS = 0.2


class Pulls:
    """state: {state: idle, pulling, done, failed or stopped; model; done, total in bytes; error}"""

    def __init__(self, hub: Hub):
        self._hub = hub
        self._stopping = False
        self._told = 0.0
        self.state: dict[str, Any] = {"state": "idle"}

    async def pull(self, name: str) -> None:
        """Does not raise: the state says how it went."""
        from edge_runtime.models import hub

        if self.state["state"] == "pulling":
            return
        self._stopping = False
        self._tell({"state": "pulling", "model": name, "done": 0, "total": 0})
        try:
            if not hub.is_name(name.strip()):
                raise InvalidRequestError("model", name, "org/repo or org/repo:Q4_0, as the hub names it")
            found = await asyncio.to_thread(hub.pull, name.strip(), progress=self._progress)
        except CancelledError:
            self._tell({"state": "stopped", "model": name})
        except (EdgeRuntimeError, OSError) as error:
            self._tell({"state": "failed", "model": name, "error": str(error)})
        else:
            self._tell({"state": "done", "model": found.name})

    def cancel(self) -> None:
        """What came stays; the next pull goes on from there."""
        self._stopping = True

    def _progress(self, done: int, total: int) -> None:
        if self._stopping:
            raise CancelledError("the download was called off")
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._tell({"state": "pulling", "model": self.state["model"], "done": done, "total": total})

    def _tell(self, state: dict[str, Any]) -> None:
        self.state = state
        self._hub.publish("pull", state)
