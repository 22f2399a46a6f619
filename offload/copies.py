"""Copies of KV on the device: which leading tokens of which sequence it holds besides the host's pages."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edge_runtime.devices.accelerator import Accelerator
from edge_runtime.devices.base import PAGE_TOKENS, KVLayout
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.offload.page_values import read_pages

PIECE_TOKENS = 256  # unpacked at once: in float32, 32 MiB of a model of 1B parameters

def token_bytes(accelerator: Accelerator) -> int:
    """KV of one token of a sequence on the device, what the device spares of it included."""
    tokens = PAGE_TOKENS * 16
    while tokens > 1:
        try:
            return max(1, accelerator.kv.bytes_for(tokens) // tokens)
        except ValueError:  # its sequences are shorter
            tokens //= 2
    return max(1, accelerator.kv.bytes_for(tokens))


class DeviceCopies:
    """By the sequence's key. The host's pages hold every token, so a copy may go at any time, and a short one may grow
    from them. All methods run on the accelerator's thread. limit: tokens that copies may have room for in all; None: as
    many as the device's budget holds."""

    def __init__(self, accelerator: Accelerator, layout: KVLayout):
        self._accelerator, self._layout = accelerator, layout
        self._copies: dict[int, Any] = {}
        self.limit: int | None = None

    def __contains__(self, key: int) -> bool:
        return key in self._copies

    def __getitem__(self, key: int) -> Any:
        return self._copies[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._copies)

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool holds in all, capacity classes left aside."""
        tokens = int(self._accelerator.kv.budget_bytes // token_bytes(self._accelerator))
        return tokens if self.limit is None else min(tokens, self.limit)

    @property
    def held(self) -> int:
        """Tokens of all copies."""
        return sum(copy.length for copy in self._copies.values())

    def taken(self, without: Iterable[int] = ()) -> int:
        """Tokens that copies have room for, those of the keys `without` not counted."""
        return sum(copy.capacity for key, copy in self._copies.items() if key not in without)

    def tokens(self, key: int, position: int) -> int:
        """Leading tokens that the device holds of a sequence whose next token stands at `position`."""
        copy = self._copies.get(key)
        if copy is None:
            return 0
        copy.length = min(copy.length, position)
        return int(copy.length)

    def fits(self, tokens: int) -> bool:
        """Whether a new copy of so many tokens finds room."""
        if self.limit is not None and self.taken() + tokens > self.limit:
            return False
        try:
            return bool(self._accelerator.kv.can_open(tokens))
        except ValueError:  # longer than the device's longest sequence
            return False

    def room(self, key: int, tokens: int) -> bool:
        """A copy with room for `tokens`, opened or grown. Where there is none for more, what the copy holds stays as it
        is."""
        kv = self._accelerator.kv
        if self.limit is not None and self.taken(without=(key,)) + tokens > self.limit:
            return False
        try:
            if key in self._copies:
                kv.grow(self._copies[key], tokens)
            else:
                self._copies[key] = kv.open(tokens)
            return True
        except (OutOfMemoryError, ValueError):
            return False

    def fill(self, key: int, pages: np.ndarray, until: int, most: int | None = None) -> int:
        """Brings tokens from the host's pages, in order, up to token `until` and at most `most` of them; returns how
        many came. Room must be there."""
        copy = self._copies[key]
        start = int(copy.length)
        stop = min(until, copy.capacity, start + most if most is not None else until)
        for first in range(start, stop, PIECE_TOKENS):
            end = min(first + PIECE_TOKENS, stop)
            self._accelerator.kv.write(copy, first, read_pages(pages, self._layout, first, end))
        return max(0, stop - start)

    def drop(self, key: int) -> None:
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._accelerator.kv.close(copy)

    def drop_all(self) -> None:
        for key in list(self._copies):
            self.drop(key)

    def forget_all(self, accelerator: Accelerator) -> None:
        """The device was lost, and its memory with it; from now on copies lie on another one."""
        self._copies.clear()
        self._accelerator = accelerator
