"""Prefetching: the lines of a record that is needed soon, spread over the work on another.

What a core can ask of memory at once is limited: prefetches that come in a burst fill that limit, and between bursts
memory stands idle. Measured on Zen 5, int8, D = 64, 4 heads, random pages, as a share of what plain loads read: no
prefetch 24 %; several streams into the second level 58 %; one stream there, in even steps, 64 %; one stream into the
first level, two records ahead, 70 %. Arithmetic alone would take somewhat more than half of the time. Jumps between
pages take the rest: a loop of loads and as many dot products needs 309 ns a record, 236 with pages in the order of
addresses, and prefetching a line per 4 KiB of the page after gained nothing.
"""
from __future__ import annotations

from llvmlite import ir

from edge_runtime.kernels.isa import Isa
from edge_runtime.kernels.vector_ir import Emit, c64

FIRST_LEVEL = 36 << 10  # bytes of records in use and on their way that the first cache level (48 KiB) may hold
SHARE = 1 / 2  # of the lines while scores are computed, and while values are


def records_ahead(isa: Isa, size: int) -> int:
    """How many records of `size` bytes lie between a record and the one that is fetched meanwhile, plus one."""
    return 2 if 3 * size <= FIRST_LEVEL and not isa.matrix_tiles else 1


def _streams(isa: Isa, size: int) -> int:
    """Parts of a record that are fetched side by side. Processors with matrix tiles: about one per 4 KiB page, where
    their own prefetcher follows one stream per page and runs ahead of each (16 KiB records: 14 against 12 GB/s)."""
    parts = 1
    while isa.matrix_tiles and parts < 4 and parts * 2 * 4096 <= size and size // 64 % (parts * 2) == 0:
        parts *= 2
    return parts


def _level(isa: Isa, size: int) -> int:
    """Locality of the prefetch: 3 into the first cache level; 2 into the second, where that has no room, and on
    processors with matrix tiles (11 against 9 GB/s)."""
    return 3 if (records_ahead(isa, size) + 1) * size <= FIRST_LEVEL and not isa.matrix_tiles else 2


class Prefetch:
    """The record at `address`, `size` bytes, in the order of addresses while another is computed: some lines in each
    turn of the loop over scores, the rest with each row's weights, some in each turn of the loop over values."""

    def __init__(self, e: Emit, address: ir.Value, size: int, score_turns: int, rows: int, value_turns: int,
                 share: float = SHARE):
        self._e, self._address, self._size, self._rows = e, address, size, rows
        lines = size // 64
        self._scores, self._values = (int(lines * share) // turns for turns in (score_turns, value_turns))
        self._middle = range(self._scores * score_turns, lines - self._values * value_turns)
        self._parts, self._locality = _streams(e.isa, size), _level(e.isa, size)

    def scores(self, turn: ir.Value) -> None:
        self._several(turn, 0, self._scores)

    def weights(self, row: int) -> None:
        count = len(self._middle)
        for line in self._middle[count * row // self._rows:count * (row + 1) // self._rows]:
            self._line(c64(64 * line))

    def values(self, turn: ir.Value) -> None:
        self._several(turn, self._middle.stop, self._values)

    def _several(self, turn: ir.Value, first: int, count: int) -> None:
        for i in range(count):
            self._line(self._e.b.add(self._e.b.mul(turn, c64(64 * count)), c64(64 * (first + i))))

    def _line(self, at: ir.Value) -> None:
        b = self._e.b
        if self._parts > 1:
            line = b.lshr(at, c64(6))
            within = b.shl(b.lshr(line, c64(self._parts.bit_length() - 1)), c64(6))
            at = b.add(b.mul(b.and_(line, c64(self._parts - 1)), c64(self._size // self._parts)), within)
        self._e.prefetch(self._address, at, self._locality)
