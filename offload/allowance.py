"""What a step may take of a device that ran out of memory: less KV first, then fewer rows."""
from __future__ import annotations

CALM = 256  # steps without trouble after which both come back by doubling: the memory may have been another program's


class Allowance:
    """rows: of one call; tokens: KV that the device may hold in all. None: as much as there is."""

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self.rows: int | None = None
        self.tokens: int | None = None
        self._calm = 0

    def shrink(self, rows: int, held: int, again: bool) -> str:
        """A step of `rows` rows did not fit, beside KV of `held` tokens, which the device has let go. again: not the
        first time in this step. Says what is allowed now, "" where nothing smaller is left."""
        self._calm = 0
        if held:
            self.tokens = 0 if again else held // 2
            return f"its KV is the host's now, and at most {self.tokens} tokens come back"
        rows = min(rows, self.rows or self.max_rows)
        if rows <= 1:
            return ""
        self.rows = rows // 2
        return f"steps run {self.rows} rows at a time"

    def worked(self, pool_tokens: int) -> None:
        """A step went well."""
        if self.rows is None and self.tokens is None:
            return
        self._calm += 1
        if self._calm < CALM:
            return
        self._calm = 0
        if self.rows is not None:
            self.rows = 2 * self.rows if 2 * self.rows < self.max_rows else None
        if self.tokens is not None:
            more = max(2 * self.tokens, pool_tokens // 8)
            self.tokens = more if more < pool_tokens else None
