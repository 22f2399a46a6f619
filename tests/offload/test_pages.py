"""Page pool, page tables and prefix index: single cases, and thousands of random steps against a plain model."""
from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest

from edge_runtime.errors import OutOfMemoryError
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import PAGE_TOKENS, KVLayout, PagePool, pages_for
from edge_runtime.offload.prefix import PrefixIndex, extend_keys, root_key

LAYOUT = KVLayout(layers=2, kv_heads=3, head_size=20, dtype="int8")


def pool_of(pages: int, layout: KVLayout = LAYOUT) -> PagePool:
    return PagePool(layout, pages * layout.page_bytes)


def test_layout_sizes():
    assert LAYOUT.padded_head_size == 32
    assert LAYOUT.record_bytes == 64 * 32 * 2 + 64 * 4 * 2
    assert LAYOUT.page_bytes == 2 * 3 * LAYOUT.record_bytes
    half = KVLayout(2, 3, 64, "fp16")
    assert half.record_bytes == 64 * 64 * 2 * 2
    assert half.bytes_per_token == 2 * 3 * 64 * 2 * 2
    with pytest.raises(ValueError, match="fp8"):
        KVLayout(1, 1, 16, "fp8")
    with pytest.raises(ValueError, match="positive"):
        KVLayout(0, 1, 16)


def test_pages_are_aligned_disjoint_and_writable():
    pool = pool_of(500)
    pages = pool.alloc_many(500)
    addresses = sorted(pool.address(page) for page in pages)
    assert all(address % 64 == 0 for address in addresses)
    assert all(b - a >= pool.page_bytes for a, b in itertools.pairwise(addresses))
    for page in pages:
        pool.view(page)[:] = page % 251
    assert all((pool.view(page) == page % 251).all() for page in pages)
    pool.check_integrity([pages])


def test_nothing_is_reserved_up_front_and_slabs_go_back():
    pool = PagePool(KVLayout(16, 8, 64), 64 << 30)
    assert pool.stats().reserved_bytes == 0
    pages = pool.alloc_many(100)
    reserved = pool.stats().reserved_bytes
    assert 100 * pool.page_bytes <= reserved <= 100 * pool.page_bytes + (40 << 20)
    for page in pages[10:]:
        pool.release(page)
    assert pool.trim() > 0
    assert pool.stats().reserved_bytes < reserved
    pool.check_integrity([pages[:10]])
    again = pool.alloc_many(200)
    pool.check_integrity([pages[:10], again])


def test_out_of_memory_has_numbers_and_takes_nothing():
    pool = pool_of(4)
    pool.alloc_many(3)
    with pytest.raises(OutOfMemoryError, match=r"2 KV pages .* 1 of 4 are free"):
        pool.alloc_many(2)
    assert pool.free == 1


def test_double_free_and_use_of_a_free_page():
    pool = pool_of(4)
    page = pool.alloc()
    pool.release(page)
    for use in (pool.release, pool.share, pool.address, pool.copy, pool.view):
        with pytest.raises(ValueError, match="free"):
            use(page)
    with pytest.raises(ValueError, match="free"):
        pool.release(12345)


def test_fork_shares_and_the_writer_copies():
    pool = pool_of(8)
    table = PageTable(pool)
    table.reserve(100)
    table.advance(100)
    for page in table.pages:
        pool.view(page)[:] = 7
    twin = table.fork()
    assert twin.pages == table.pages and pool.used == 2 and twin.shareable == table.shareable == 0
    twin.reserve(1)
    assert twin.pages[0] == table.pages[0] and twin.pages[1] != table.pages[1]
    assert (pool.view(twin.pages[1]) == 7).all()
    assert twin.addresses.tolist() == [pool.address(page) for page in twin.pages]
    table.reserve(1)  # the only holder now: no copy
    assert pool.used == 3
    table.release()
    twin.release()
    assert pool.used == 0


def test_shareable_tokens_are_those_on_top_of_nothing_else():
    table = PageTable(pool_of(8))
    table.reserve(200)
    table.advance(70, shareable=True)
    table.advance(1)
    table.advance(20, shareable=True)
    assert (table.length, table.shareable) == (91, 70)
    table.truncate(30)
    table.reserve(5)
    table.advance(5, shareable=True)
    assert (table.length, table.shareable, table.fork().shareable) == (35, 35, 35)


def test_reserve_is_all_or_nothing():
    pool = pool_of(3)
    table = PageTable(pool)
    table.reserve(70)
    table.advance(70)
    twin = table.fork()
    with pytest.raises(OutOfMemoryError):
        twin.reserve(64)  # a copy and a new page, one is free
    assert twin.pages_short(64) == 2
    assert twin.pages[0] == table.pages[0] and twin.length == 70
    pool.check_integrity([table.pages, twin.pages])
    with pytest.raises(ValueError, match="reserve first"):
        table.advance(64)


def test_prefix_index_evicts_the_least_recently_used_leaf():
    pool = pool_of(16)
    index = PrefixIndex(pool)
    root = root_key(b"model")
    chains = []
    for chain in range(3):
        tokens = np.full(3 * PAGE_TOKENS, chain, np.int32)
        keys = extend_keys([], tokens, root)
        for key, parent in zip(keys, [root, *keys]):
            page = pool.alloc()
            assert index.insert(key, parent, page)
            pool.release(page)
        chains.append(keys)
    assert index.evictable == 9
    held = index.acquire(chains[0])  # the oldest chain becomes the youngest, and is in use
    assert index.evict(2) == 2
    assert [index.match(keys) for keys in chains] == [3, 1, 3]
    assert index.evict(100) == 4
    assert [index.match(keys) for keys in chains] == [3, 0, 0]
    for page in held:
        pool.release(page)
    assert index.evict(1) == 1 and index.match(chains[0]) == 2
    index.check_integrity()
    assert extend_keys([], np.zeros(64, np.int32), root) != extend_keys([], np.zeros(64, np.int32), root_key(b"b"))


def test_forgotten_pages_take_what_stands_on_them_along():
    pool = pool_of(16)
    index = PrefixIndex(pool)
    root = root_key()
    trunk = np.arange(2 * PAGE_TOKENS, dtype=np.int32)
    chains = [extend_keys([], np.concatenate([trunk, np.full(PAGE_TOKENS, i, np.int32)]), root) for i in range(3)]
    for keys in chains:
        for key, parent in zip(keys, [root, *keys]):
            page = pool.alloc()
            index.insert(key, parent, page)
            pool.release(page)
    assert len(index) == 5
    held = index.acquire(chains[0])
    index.forget(chains[0][2:])
    assert [index.match(keys) for keys in chains] == [2, 3, 3]
    index.forget([chains[1][1], b"unknown"])
    assert [index.match(keys) for keys in chains] == [1, 1, 1] and len(index) == 1
    index.check_integrity()
    pool.check_integrity([held, index.pages])
    index.forget(chains[2])
    assert len(index) == 0 and pool.used == 3


def test_the_pool_reclaims_cached_pages():
    pool = pool_of(4)
    index = PrefixIndex(pool)
    pool.reclaim = index.evict
    root = root_key()
    keys = extend_keys([], np.arange(4 * PAGE_TOKENS, dtype=np.int32), root)
    for key, parent in zip(keys, [root, *keys]):
        page = pool.alloc()
        index.insert(key, parent, page)
        pool.release(page)
    assert pool.free == 0
    assert len(pool.alloc_many(3)) == 3
    assert len(index) == 1 and index.match(keys) == 1


class Story:
    """A table beside what it ought to hold: its tokens, as plain Python."""

    def __init__(self, table: PageTable, tokens: list[int]):
        self.table, self.tokens = table, tokens
        self.keys: list[bytes] = []


@pytest.mark.parametrize("run", range(3))
def test_random_steps_against_a_plain_model(run):
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30))) + run
    print(f"seed {seed}")
    rng = random.Random(seed)
    pool = pool_of(rng.choice([12, 40, 200]), KVLayout(1, 1, 16))
    pool._slab_pages = rng.choice([1, 3, 16])
    index = PrefixIndex(pool)
    pool.reclaim = index.evict
    root = root_key(b"m")
    stories: list[Story] = []

    def token_memory(page: int) -> np.ndarray:
        return pool.view(page)[:4 * PAGE_TOKENS].view(np.int32)

    def write(story: Story, tokens: list[int]) -> None:
        try:
            story.table.reserve(len(tokens))
        except OutOfMemoryError:
            assert pool.free + index.evictable < story.table.pages_short(len(tokens)) + index_overhang()
            return
        for offset, token in enumerate(tokens):
            page, slot = divmod(story.table.length + offset, PAGE_TOKENS)
            token_memory(story.table.pages[page])[slot] = token
        story.table.advance(len(tokens))
        story.tokens += tokens
        extend_keys(story.keys, np.array(story.tokens, np.int32), root)
        for i in range(len(story.keys)):
            index.insert(story.keys[i], story.keys[i - 1] if i else root, story.table.pages[i])

    def index_overhang() -> int:
        # Idle pages above one in use stay: only then may fewer than `evictable` pages be reclaimed.
        before, idle = len(index), index.evictable
        return idle - index.evict(len(index)) if before else 0

    for step in range(2500):
        action = rng.random()
        story = rng.choice(stories) if stories else None
        if story is None or (action < 0.12 and len(stories) < 12):
            tokens = [rng.randrange(2) for _ in range(rng.choice([1, 63, 64, 65, 130, 300]))]
            tokens = [tokens[0]] * (len(tokens) // PAGE_TOKENS * PAGE_TOKENS) + tokens[-(len(tokens) % PAGE_TOKENS):]
            story = Story(PageTable(pool), [])
            stories.append(story)
            story.keys = extend_keys([], np.array(tokens, np.int32), root)
            story.table.adopt(index.acquire(story.keys[:(len(tokens) - 1) // PAGE_TOKENS]))
            story.tokens = tokens[:story.table.length]
            rest = tokens[story.table.length:]
            story.keys = story.keys[:len(story.tokens) // PAGE_TOKENS]
            write(story, rest)
        elif action < 0.55:
            write(story, [rng.randrange(1000) for _ in range(rng.choice([1, 1, 1, 5, 64, 100]))])
        elif action < 0.65 and len(stories) < 12:
            twin = Story(story.table.fork(), list(story.tokens))
            twin.keys = list(story.keys)
            stories.append(twin)
        elif action < 0.78:
            length = rng.randrange(len(story.tokens) + 1)
            story.table.truncate(length)
            story.tokens = story.tokens[:length]
            story.keys = story.keys[:length // PAGE_TOKENS]
        elif action < 0.9:
            story.table.release()
            stories.remove(story)
        elif action < 0.94:
            index.evict(rng.randrange(5))
        elif action < 0.96:
            index.forget(rng.sample(story.keys, min(len(story.keys), rng.randrange(3))))
        else:
            pool.trim()

        if step % 10 == 0 or step > 2400:
            pool.check_integrity([index.pages, *(s.table.pages for s in stories)])
            index.check_integrity()
            for s in stories:
                assert s.table.length == len(s.tokens) <= s.table.capacity
                assert s.table.addresses.tolist() == [pool.address(page) for page in s.table.pages]
                held = [token_memory(page) for page in s.table.pages[:pages_for(s.table.length)]]
                assert not held or np.concatenate(held)[:s.table.length].tolist() == s.tokens
    for s in stories:
        s.table.release()
    index.clear()
    assert pool.used == 0
    pool.trim()
    assert pool.stats().reserved_bytes == 0
