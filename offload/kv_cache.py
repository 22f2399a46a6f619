"""All KV of one model on the host: the pool, the prefix index, and the tables of idle conversations."""
from __future__ import annotations

from collections import Counter, OrderedDict

from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import KVLayout, PagePool
from edge_runtime.offload.prefix import PrefixIndex, root_key

EVICTED_SHARE = 32


class KVCache:
    """Three kinds of holders share the pool: running sequences, the prefix index, and parked tables. When the pool is
    short, cached prefixes go first, then parked tables, the longest idle first: both can be computed again.

    Not thread-safe: the engine's thread owns it. `salt` names the model (and adapter) whose KV this is.
    """

    def __init__(self, layout: KVLayout, budget_bytes: int, salt: bytes = b""):
        self.pool = PagePool(layout, budget_bytes)
        self.index = PrefixIndex(self.pool)
        self.root = root_key(salt)
        self._parked: OrderedDict[int, PageTable] = OrderedDict()
        self.pool.reclaim = self._reclaim

    def table(self) -> PageTable:
        return PageTable(self.pool)

    def owns(self, table: PageTable) -> bool:
        return table.pool is self.pool

    def park(self, table: PageTable) -> None:
        """Keep an idle table's pages as long as nobody needs them. It may be found empty when it is unparked."""
        table.truncate(table.length)  # reserved pages hold nothing
        if table.length:
            self._parked[id(table)] = table

    def unpark(self, table: PageTable) -> None:
        self._parked.pop(id(table), None)

    def can_get(self, pages: int) -> bool:
        """Whether a running sequence could get so many: free ones, and those that only caches hold."""
        if pages <= self.pool.free:
            return True
        cached = Counter(self.index.pages)
        for table in self._parked.values():
            cached.update(table.pages)
        return pages <= self.pool.free + sum(self.pool.refcount(page) == count for page, count in cached.items())

    def check_integrity(self, running: list[PageTable] | None = None) -> None:
        """`running`: every other table with pages; None leaves the reference counts unchecked."""
        holders = None
        if running is not None:
            holders = [self.index.pages, *(t.pages for t in self._parked.values()), *(t.pages for t in running)]
        self.pool.check_integrity(holders)
        self.index.check_integrity()

    def _reclaim(self, count: int) -> None:
        target = self.pool.free + count
        # An eviction looks at the whole index, so it takes a share of it at a time, not page by page.
        self.index.evict(max(count, len(self.index) // EVICTED_SHARE))
        while self.pool.free < target and self._parked:
            _, table = self._parked.popitem(last=False)
            table.release()
            self.index.evict(target - self.pool.free)
