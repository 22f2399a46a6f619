"""The cache's promises between its three kinds of holders."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import OutOfMemoryError
from edge_runtime.offload.kv_cache import KVCache
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import KVLayout
from edge_runtime.offload.prefix import extend_keys

LAYOUT = KVLayout(1, 1, 16)


def cache_of(pages: int) -> KVCache:
    return KVCache(LAYOUT, pages * LAYOUT.page_bytes, b"model")


def filled(cache: KVCache, tokens: int, seed: int, index: bool = True) -> PageTable:
    table = cache.table()
    table.reserve(tokens)
    table.advance(tokens)
    if index:
        keys = extend_keys([], np.full(tokens, seed, np.int32), cache.root)
        for key, parent, page in zip(keys, [cache.root, *keys], table.pages):
            cache.index.insert(key, parent, page)
    return table


def test_prefixes_go_first_then_parked_tables_the_longest_idle_first():
    cache = cache_of(10)
    filled(cache, 128, 1).release()
    old, young = filled(cache, 192, 2), filled(cache, 192, 3, index=False)
    cache.park(old)
    cache.park(young)
    assert cache.pool.free == 2 and cache.can_get(10) and not cache.can_get(11)
    first = filled(cache, 4 * 64, 4, index=False)
    assert len(cache.index) == 3 and old.length == young.length == 192
    second = filled(cache, 64, 5, index=False)
    assert (old.length, young.length) == (0, 192)
    cache.check_integrity([first, second])
    third = filled(cache, 128, 6, index=False)
    assert young.length == 192 and not len(cache.index)
    cache.unpark(young)
    assert not cache.can_get(1)
    with pytest.raises(OutOfMemoryError):
        filled(cache, 64, 7)
    cache.check_integrity([first, second, third, young])


def test_pages_in_use_are_never_counted_as_available():
    cache = cache_of(4)
    table = filled(cache, 256, 1)
    assert not cache.can_get(1)
    twin = table.fork()
    cache.park(twin)
    assert not cache.can_get(1)
    table.release()
    assert cache.can_get(4)


def test_parking_an_empty_table_keeps_nothing():
    cache = cache_of(4)
    table = cache.table()
    table.reserve(100)
    cache.park(table)
    assert cache.pool.used == 0 and not cache._parked
    cache.unpark(table)


def test_salts_keep_models_apart():
    assert cache_of(1).root != KVCache(LAYOUT, LAYOUT.page_bytes, b"other").root


def test_evicting_a_large_index_is_amortized():
    cache = cache_of(640)
    for seed in range(64):
        filled(cache, 640, seed).release()
    assert cache.pool.free == 0
    cache.pool.alloc()
    assert cache.pool.free == 640 // 32 - 1
