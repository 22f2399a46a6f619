"""What the routes of one server share."""
from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from edge_runtime.apps.model_host import ModelHost
from edge_runtime.apps.server.metrics import Metrics
from edge_runtime.apps.server.responses import ResponseStore
from edge_runtime.apps.server.settings import ServerSettings


@dataclass
class ServerState:
    """running: tasks that answer a request now; closing: no more are taken, those that are cancelled say why; paths:
    those that metrics tell apart."""

    host: ModelHost
    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)
    running: set[asyncio.Task[object]] = field(default_factory=set)
    closing: bool = False
    paths: frozenset[str] = frozenset()
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.responses = ResponseStore(self.settings.keep_responses)

    def cancel_running(self) -> int:
        """End what still runs, with an error that says why; returns how many."""
        self.closing = True
        own = asyncio.current_task()
        ended = [task for task in self.running if task is not own]
        for task in ended:
            task.cancel()
        return len(ended)
