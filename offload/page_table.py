"""The KV pages of one sequence, in order: grown by need, shared by forks, copied before a shared one is written."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.offload.pages import PAGE_TOKENS, PagePool, pages_for


class PageTable:
    """`length` tokens of KV in `pages`; pages past `ceil(length / 64)` are reserved and belong to this table alone.

    A step is: `reserve(n)`, let the device write n tokens at `addresses`, `advance(n)`. `shareable` counts the leading
    tokens whose KV every sequence with these tokens would compute alike, bit for bit: those computed as a prompt, on
    top of nothing else.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0
        self.shareable = 0
        self._addresses = np.zeros(8, np.int64)

    @property
    def addresses(self) -> np.ndarray:
        """int64 [len(pages)]: a view that is right until the table next changes."""
        return self._addresses[:len(self.pages)]

    @property
    def capacity(self) -> int:
        """Tokens that the pages held now can take."""
        return len(self.pages) * PAGE_TOKENS

    def pages_short(self, tokens: int) -> int:
        """Pages that `reserve(tokens)` would allocate."""
        return max(0, pages_for(self.length + tokens) - len(self.pages)) + self._writes_shared_page(tokens)

    def reserve(self, tokens: int) -> None:
        """Make room to write `tokens` tokens after `length`. Raises `OutOfMemoryError` and changes nothing when the
        pool is short."""
        short = self.pages_short(tokens)
        if not short:
            return
        new = self.pool.alloc_many(short)
        if self._writes_shared_page(tokens):
            last, copy = self.length // PAGE_TOKENS, new.pop()
            self.pool.copy_into(self.pages[last], copy)
            self.pool.release(self.pages[last])
            self._set(last, copy)
        self._extend(new)

    def advance(self, tokens: int, shareable: bool = False) -> None:
        """`tokens` more tokens were written. shareable: as they are for every sequence with the same ones before."""
        if self.length + tokens > self.capacity:
            raise ValueError(f"{tokens} tokens after {self.length} do not fit {len(self.pages)} pages: reserve first")
        if shareable and self.shareable == self.length:
            self.shareable += tokens
        self.length += tokens

    def adopt(self, pages: Sequence[int]) -> None:
        """Begin with full pages already held for this table (a cached prefix)."""
        if self.pages:
            raise ValueError("only an empty table adopts a prefix")
        self._extend(pages)
        self.length = self.shareable = len(pages) * PAGE_TOKENS

    def fork(self) -> PageTable:
        """A table with the same tokens; both share all pages, and whoever writes into the last one copies it first."""
        twin = PageTable(self.pool)
        twin._extend([self.pool.share(page) for page in self.pages[:pages_for(self.length)]])
        twin.length, twin.shareable = self.length, self.shareable
        return twin

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, and reserved pages."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: must be 0 to {self.length}")
        keep = pages_for(length)
        for page in self.pages[keep:]:
            self.pool.release(page)
        del self.pages[keep:]
        self.length, self.shareable = length, min(length, self.shareable)

    def release(self) -> None:
        """Give all pages back."""
        self.truncate(0)

    def _writes_shared_page(self, tokens: int) -> bool:
        if tokens <= 0 or self.length % PAGE_TOKENS == 0:
            return False
        return self.pool.refcount(self.pages[self.length // PAGE_TOKENS]) > 1

    def _set(self, index: int, page: int) -> None:
        self.pages[index] = page
        self._addresses[index] = self.pool.address(page)

    def _extend(self, pages: Sequence[int]) -> None:
        start, end = len(self.pages), len(self.pages) + len(pages)
        if end > len(self._addresses):
            grown = np.zeros(max(end, 2 * len(self._addresses)), np.int64)
            grown[:start] = self._addresses[:start]
            self._addresses = grown
        self.pages.extend(pages)
        self._addresses[start:end] = self.pool.addresses(pages)
