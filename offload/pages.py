"""Host memory for KV pages: a pool that grows and shrinks by slabs, with a reference count per page."""
from __future__ import annotations

import ctypes
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.devices.base import KV_DTYPES, PAGE_TOKENS, KVLayout
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.kernels.huge_memory import HugeMemory

__all__ = ["KV_DTYPES", "PAGE_TOKENS", "KVLayout", "PagePool", "PoolStats", "pages_for"]

SLAB_BYTES = 32 << 20  # one mmap per 32 MiB: a few system calls per GB, and little to strand when a slab empties


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens of one sequence fill."""
    return -(-tokens // PAGE_TOKENS)


@dataclass(frozen=True)
class PoolStats:
    """used, shared, capacity: pages (shared: held more than once); reserved_bytes: mapped slabs; budget_bytes."""

    used: int
    shared: int
    capacity: int
    page_bytes: int
    reserved_bytes: int
    budget_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.used * self.page_bytes


class PagePool:
    """Pages of one `KVLayout` within a budget of bytes. Page ids are small integers; a page's address is stable
    while it lives. Not thread-safe: one thread, the engine's, owns it.

    `reclaim`, when set, is asked for pages before the pool says that it is full: `reclaim(n)` should release about
    n pages that only a cache holds.
    """

    def __init__(self, layout: KVLayout, budget_bytes: int):
        self.layout = layout
        self.page_bytes = layout.page_bytes
        self.budget_bytes = int(budget_bytes)
        self.capacity = max(0, self.budget_bytes) // self.page_bytes
        self.reclaim: Callable[[int], object] | None = None
        self._slab_pages = max(1, min(SLAB_BYTES // self.page_bytes, self.capacity))
        self._slabs: dict[int, HugeMemory] = {}  # slab index -> memory; ids of slab s: s * slab_pages + 0, 1, ...
        self._slab_used: dict[int, int] = {}
        self._refcounts: dict[int, int] = {}
        self._free: list[int] = []  # heap: low ids first, so that high slabs empty and go back

    @property
    def used(self) -> int:
        return len(self._refcounts)

    @property
    def free(self) -> int:
        """Pages that can be had without reclaiming any."""
        return self.capacity - len(self._refcounts)

    def alloc(self) -> int:
        """One page, held once. Raises `OutOfMemoryError` at the budget."""
        return self.alloc_many(1)[0]

    def alloc_many(self, count: int) -> list[int]:
        """`count` pages, or `OutOfMemoryError` and none."""
        if count > self.free and self.reclaim is not None:
            self.reclaim(count - self.free)
        if count > self.free:
            raise OutOfMemoryError(
                f"{count} KV pages of {self.page_bytes / 2**20:.2f} MiB wanted, {self.free} of {self.capacity} are "
                f"free (KV budget {self.budget_bytes / 2**20:.0f} MiB). End a sequence or give the KV more memory.")
        while len(self._free) < count:
            self._grow()
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._refcounts[page] = 1
            self._slab_used[page // self._slab_pages] += 1
        return pages

    def share(self, page: int) -> int:
        """Hold a live page once more."""
        self._refcounts[page] = self.refcount(page) + 1
        return page

    def release(self, page: int) -> None:
        """Give up one hold; the last one frees the page."""
        count = self.refcount(page)
        if count > 1:
            self._refcounts[page] = count - 1
            return
        del self._refcounts[page]
        heapq.heappush(self._free, page)
        slab = page // self._slab_pages
        self._slab_used[slab] -= 1

    def copy(self, page: int) -> int:
        """A new page with the bytes of `page`."""
        source = self.address(page)
        new = self.alloc()
        ctypes.memmove(self.address(new), source, self.page_bytes)
        return new

    def copy_into(self, page: int, target: int) -> None:
        """The bytes of `page` into `target`, both live."""
        ctypes.memmove(self.address(target), self.address(page), self.page_bytes)

    def refcount(self, page: int) -> int:
        try:
            return self._refcounts[page]
        except KeyError:
            raise ValueError(f"page {page} is free: it was released once too often, or never allocated") from None

    def address(self, page: int) -> int:
        """Address of a live page, a multiple of 64."""
        self.refcount(page)
        slab, index = divmod(page, self._slab_pages)
        return self._slabs[slab].address + index * self.page_bytes

    def addresses(self, pages: Sequence[int]) -> np.ndarray:
        """int64 [len(pages)]."""
        return np.array([self.address(page) for page in pages], np.int64)

    def view(self, page: int) -> np.ndarray:
        """uint8 [page_bytes]: the memory of a live page. Do not keep it beyond the page."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.page_bytes).from_address(self.address(page)))

    def trim(self) -> int:
        """Give slabs without a live page back to the system; returns their bytes. For idle moments."""
        empty = {slab for slab, used in self._slab_used.items() if used == 0}
        given_back = 0
        for slab in empty:
            given_back += self._slabs[slab].nbytes
            self._slabs.pop(slab).close()
            del self._slab_used[slab]
        if empty:
            self._free = [page for page in self._free if page // self._slab_pages not in empty]
            heapq.heapify(self._free)
        return given_back

    def stats(self) -> PoolStats:
        return PoolStats(
            used=self.used, shared=sum(count > 1 for count in self._refcounts.values()), capacity=self.capacity,
            page_bytes=self.page_bytes, reserved_bytes=sum(slab.nbytes for slab in self._slabs.values()),
            budget_bytes=self.budget_bytes)

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError where the books do not agree; `holders`, every list of held pages, checks the
        reference counts too."""
        free, live = set(self._free), set(self._refcounts)
        every = {slab * self._slab_pages + i for slab in self._slabs for i in range(self._slab_pages)}
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & live, f"pages both free and live: {sorted(free & live)}"
        assert free | live == every, f"pages neither free nor live: {sorted(every - free - live)}"
        assert len(live) <= self.capacity, f"{len(live)} pages live, the budget allows {self.capacity}"
        for slab, used in self._slab_used.items():
            assert used == sum(page // self._slab_pages == slab for page in live), f"slab {slab} miscounts"
        if holders is not None:
            counts: dict[int, int] = {}
            for pages in holders:
                for page in pages:
                    counts[page] = counts.get(page, 0) + 1
            assert counts == self._refcounts, f"held {counts}, counted {self._refcounts}"

    def _grow(self) -> None:
        slab = next(index for index in range(len(self._slabs) + 1) if index not in self._slabs)
        try:
            self._slabs[slab] = HugeMemory(self._slab_pages * self.page_bytes)
        except OSError as error:
            raise OutOfMemoryError(f"the system refused {self._slab_pages * self.page_bytes / 2**20:.0f} MiB for KV "
                                   f"pages: {error}") from error
        self._slab_used[slab] = 0
        first = slab * self._slab_pages
        for page in range(first, first + self._slab_pages):
            heapq.heappush(self._free, page)
