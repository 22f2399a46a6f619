"""What an engine is doing, for those who watch it: a snapshot taken from any thread, without stopping it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.engine import Engine
    from edge_runtime.offload.hybrid_status import HybridStatus


@dataclass(frozen=True)
class EngineStatus:
    """running, waiting: sequences in the batch, and those without a place yet. pages_used of pages_total hold KV, of
    page_bytes each; pages_cached of them belong to the prefix index, which gives them up when they are needed. kv_home:
    where all KV lives, "host" or "device" (then pages hold its tokens alone); mode: how a step is computed, of a hybrid
    device the mode of its last lap. steps, preemptions: since the engine's start. device_kv_bytes of device_kv_budget:
    KV in an accelerator's memory, of a hybrid device copies. placement: who attends, of a hybrid device."""

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
    device_kv_bytes: int = 0
    device_kv_budget: int = 0
    placement: HybridStatus | None = None

    @property
    def host_kv_bytes(self) -> int:
        """KV in this machine's memory, cached prefixes included."""
        return 0 if self.kv_home == "device" else self.pages_used * self.page_bytes

    @property
    def host_kv_budget(self) -> int:
        return 0 if self.kv_home == "device" else self.pages_total * self.page_bytes

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting


def status_of(engine: Engine) -> EngineStatus:
    batcher, cache, device = engine.batcher, engine.cache, engine.device
    told = getattr(device, "status", None)  # of a hybrid device
    placement: HybridStatus | None = told() if told is not None else None
    used, budget = _device_kv(device, placement)
    mode = getattr(device, "mode", "whole-model")
    if placement is not None:
        mode = "hybrid" if placement.mode is None else placement.mode.value
    return EngineStatus(
        running=len(batcher.running), waiting=batcher.waiting, pages_used=cache.pool.used,
        pages_cached=len(cache.index), pages_total=cache.pool.capacity, page_bytes=cache.pool.page_bytes,
        kv_home=getattr(device, "kv_home", "host"), mode=mode, steps=engine.steps, preemptions=batcher.preemptions,
        device_kv_bytes=used, device_kv_budget=budget, placement=placement)


def _device_kv(device: Any, placement: HybridStatus | None) -> tuple[int, int]:
    """Bytes of KV on the device, and what it may take there."""
    accelerator = getattr(device, "accelerator", None)
    if accelerator is None:
        return 0, 0
    memory = accelerator.memory()
    if placement is None:
        return memory.kv_used, memory.kv_budget
    return memory.kv_budget * placement.device_tokens // max(1, placement.pool_tokens), memory.kv_budget
