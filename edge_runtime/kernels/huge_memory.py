"""Large memory that the system may back with huge pages: reading it then misses the address caches 500 times less."""
from __future__ import annotations

import contextlib
import ctypes
import mmap

HUGE_PAGE = 2 << 20


class HugeMemory:
    """Anonymous private memory of zeros, aligned to 2 MiB. Untouched parts cost nothing; `close` gives it all back.

    nbytes: rounded up to whole huge pages. address: of the first byte, until `close`.
    """

    def __init__(self, nbytes: int):
        self.nbytes = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
        length = self.nbytes + HUGE_PAGE
        if hasattr(mmap, "MAP_PRIVATE"):
            # The default, MAP_SHARED, would make this shared memory, which huge pages rarely back.
            self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
        else:
            self._map = mmap.mmap(-1, length)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = -(-start // HUGE_PAGE) * HUGE_PAGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without transparent huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def close(self) -> None:
        self._map.close()
