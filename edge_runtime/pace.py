"""How many prompt rows a step may carry on this machine, so that nobody waits long for it to end."""
from __future__ import annotations

from edge_runtime.batching import Batcher
from edge_runtime.offload.pages import PAGE_TOKENS

PROMPT_SECONDS = 1.0  # of a step that holds prompts only: how long a cancellation may take to be seen
MIXED_SECONDS = 0.15  # of a step in which somebody watches tokens come: about the pace of reading aloud
FIRST_ROWS = 128  # before anything is known; a fast machine loses little by one short step
MIXED_ROWS = 128  # more would gain nothing: the wide kernels are at their peak


class Pace:
    """Sets the batcher's row budgets from the speed of the steps so far. A row's result does not depend on them."""

    def __init__(self, batcher: Batcher):
        self._batcher = batcher
        self.rows_per_second = 0.0
        batcher.prompt_rows = FIRST_ROWS

    def note(self, rows: int, seconds: float) -> None:
        """A step with `rows` prompt rows took `seconds`; few of them say nothing about many."""
        if rows < PAGE_TOKENS:
            return
        rate = rows / max(seconds, 1e-6)
        self.rows_per_second = rate if not self.rows_per_second else 0.5 * (self.rows_per_second + rate)
        batcher = self._batcher
        batcher.prompt_rows = max(PAGE_TOKENS, self._pages(PROMPT_SECONDS))
        batcher.mixed_rows = min(MIXED_ROWS, max(PAGE_TOKENS, self._pages(MIXED_SECONDS)))

    def _pages(self, seconds: float) -> int:
        """Rows of whole pages that `seconds` suffice for."""
        return int(self.rows_per_second * seconds) // PAGE_TOKENS * PAGE_TOKENS
