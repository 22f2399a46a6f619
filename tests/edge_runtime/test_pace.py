"""Row budgets follow the machine's speed, in whole pages and within bounds."""
from __future__ import annotations

from edge_runtime.batching import Batcher
from edge_runtime.offload.kv_cache import KVCache
from edge_runtime.offload.pages import KVLayout
from edge_runtime.pace import FIRST_ROWS, Pace


def test_budgets():
    batcher = Batcher(KVCache(KVLayout(1, 1, 16), 1 << 20), 512, 8)
    pace = Pace(batcher)
    assert batcher.prompt_rows == FIRST_ROWS
    pace.note(1, 10.0)  # a decoded token says nothing
    assert batcher.prompt_rows == FIRST_ROWS
    pace.note(128, 1.28)
    assert (batcher.prompt_rows, batcher.mixed_rows) == (64, 64)
    pace.note(128, 0.032)
    assert batcher.prompt_rows == 2048 and batcher.mixed_rows == 128
    for _ in range(20):
        pace.note(64, 64.0)
    assert (batcher.prompt_rows, batcher.mixed_rows) == (64, 64)
