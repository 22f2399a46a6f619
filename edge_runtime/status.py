"""What an engine is doing, for those who watch it: a snapshot taken from any thread, without stopping it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.engine import Engine


@dataclass(frozen=True)
class EngineStatus:
    """running, waiting: sequences in the batch, and those without a place yet. pages_used of pages_total hold KV, of
    page_bytes each; pages_cached of them belong to the prefix index, which gives them up when they are needed. kv_home:
    where KV lives, "host" or "device"; mode: how a step is computed. steps, preemptions: since the engine's start."""

    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    pages_total: int
    page_bytes: int
    kv_home: str
    mode: str
    steps: int
    preemptions: int

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting


def status_of(engine: Engine) -> EngineStatus:
    batcher, cache, device = engine.batcher, engine.cache, engine.device
    return EngineStatus(
        running=len(batcher.running), waiting=batcher.waiting, pages_used=cache.pool.used,
        pages_cached=len(cache.index), pages_total=cache.pool.capacity, page_bytes=cache.pool.page_bytes,
        kv_home=getattr(device, "kv_home", "host"), mode=getattr(device, "mode", "whole-model"), steps=engine.steps,
        preemptions=batcher.preemptions)
