"""Prefixes whose KV is already computed: full pages found again by a hash chained over their tokens."""
from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from edge_runtime.offload.pages import PAGE_TOKENS, PagePool


def root_key(salt: bytes = b"") -> bytes:
    """The parent of first pages. `salt` keeps models and adapters apart: the same tokens give other KV there."""
    return blake2b(salt, digest_size=16, person=b"edge-kv-root").digest()


def page_key(parent: bytes, token_ids: np.ndarray) -> bytes:
    """Key of the page that holds the 64 `token_ids` (int32) after the page or root `parent`."""
    return blake2b(parent + np.ascontiguousarray(token_ids, "<i4").tobytes(), digest_size=16).digest()


def extend_keys(keys: list[bytes], token_ids: np.ndarray, root: bytes) -> list[bytes]:
    """Append to `keys` those of the full pages of `token_ids` that it lacks; returns it."""
    for index in range(len(keys), len(token_ids) // PAGE_TOKENS):
        parent = keys[-1] if keys else root
        keys.append(page_key(parent, token_ids[index * PAGE_TOKENS:(index + 1) * PAGE_TOKENS]))
    return keys


@dataclass
class _Entry:
    page: int
    parent: bytes | None  # None where the parent is not in the index
    used: int  # tick of the last use
    children: int = 0


@dataclass
class PrefixIndex:
    """Holds one reference on each page it knows; gives up the least recently used ones that nobody else holds when
    the pool asks. Register with `pool.reclaim = index.evict`."""

    pool: PagePool
    hits: int = 0
    inserted: int = 0
    evicted: int = 0
    _entries: dict[bytes, _Entry] = field(default_factory=dict)
    _tick: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    @property
    def pages(self) -> list[int]:
        return [entry.page for entry in self._entries.values()]

    @property
    def evictable(self) -> int:
        """Pages that only the index holds; a few of them may sit under a page in use and stay."""
        return sum(self.pool.refcount(entry.page) == 1 for entry in self._entries.values())

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of the leading `keys` are cached."""
        count = 0
        while count < len(keys) and keys[count] in self._entries:
            count += 1
        return count

    def acquire(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached prefix of `keys`, each held once more for the caller."""
        found = [self._entries[key] for key in keys[:self.match(keys)]]
        self._tick += 1
        for entry in found:
            entry.used = self._tick
        self.hits += len(found)
        return [self.pool.share(entry.page) for entry in found]

    def insert(self, key: bytes, parent: bytes, page: int) -> bool:
        """Remember a full page; False where the key is known already (the first page stays)."""
        self._tick += 1
        known = self._entries.get(key)
        if known is not None:
            known.used = self._tick
            return False
        above = self._entries.get(parent)
        if above is not None:
            above.children += 1
        self._entries[key] = _Entry(self.pool.share(page), parent if above is not None else None, self._tick)
        self.inserted += 1
        return True

    def evict(self, count: int) -> int:
        """Release up to `count` pages that only the index holds, leaves first, oldest first; returns how many."""
        leaves = [(entry.used, key) for key, entry in self._entries.items() if self._idle_leaf(entry)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < count:
            _, key = heapq.heappop(leaves)
            entry = self._entries.pop(key)
            self.pool.release(entry.page)
            freed += 1
            if entry.parent is not None:
                above = self._entries[entry.parent]
                above.children -= 1
                if self._idle_leaf(above):
                    heapq.heappush(leaves, (above.used, entry.parent))
        self.evicted += freed
        return freed

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop pages that are not to be trusted, and all that was computed on top of them."""
        doomed = {key for key in keys if key in self._entries}
        for key, entry in self._entries.items():  # in order of insertion: parents come before their children
            if entry.parent in doomed:
                doomed.add(key)
        for key in doomed:
            entry = self._entries[key]
            self.pool.release(entry.page)
            if entry.parent is not None and entry.parent not in doomed:
                self._entries[entry.parent].children -= 1
        for key in doomed:
            del self._entries[key]

    def clear(self) -> None:
        for entry in self._entries.values():
            self.pool.release(entry.page)
        self._entries.clear()

    def check_integrity(self) -> None:
        children: dict[bytes, int] = {}
        for entry in self._entries.values():
            assert self.pool.refcount(entry.page) >= 1
            if entry.parent is not None:
                assert entry.parent in self._entries, "a page outlived its parent"
                children[entry.parent] = children.get(entry.parent, 0) + 1
        for key, entry in self._entries.items():
            assert entry.children == children.get(key, 0), "an entry miscounts its children"
        assert len(set(self.pages)) == len(self._entries), "two keys hold one page"

    def _idle_leaf(self, entry: _Entry) -> bool:
        return not entry.children and self.pool.refcount(entry.page) == 1
