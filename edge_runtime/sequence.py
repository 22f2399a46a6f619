"""One sequence as the batcher sees it: its tokens, and the KV computed for them."""
from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from enum import Enum, IntEnum

import numpy as np

from edge_runtime.early_exit import ExitState
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import PAGE_TOKENS
from edge_runtime.offload.prefix import extend_keys

_KEYS = itertools.count(1)


class Priority(IntEnum):
    """Interactive requests are served first; batch requests still get a share (see `Batcher`)."""

    INTERACTIVE = 0
    BATCH = 1


class Wants(Enum):
    """What a sequence's rows are computed for: a next token, its hidden states (an embedding), the log-probabilities
    of its own tokens (a score), or only their KV."""

    TOKEN = "token"
    HIDDEN = "hidden"
    SCORE = "score"
    KV = "kv"


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and generated tokens; `table.length` of them have their KV computed, the others are `pending`.

    One pending token is a decode row; more are a prompt, or a preempted sequence that is computed again.
    """

    def __init__(self, token_ids: Seq[int] | np.ndarray, table: PageTable, root: bytes, *,
                 priority: Priority = Priority.INTERACTIVE, wants: Wants = Wants.TOKEN):
        ids = np.asarray(token_ids, np.int32)
        self._tokens = np.empty(max(16, len(ids) + 64), np.int32)
        self._tokens[:len(ids)] = ids
        self.key = next(_KEYS)  # names it to devices, of this process's sequences alone
        self.length = len(ids)
        self.prompt_length = len(ids)
        self.table = table
        self.priority = priority
        self.wants = wants
        self.state = State.WAITING
        self.order = 0  # arrival, set by the batcher
        self.cached_tokens = 0  # of the prompt, found computed at first admission
        self.preemptions = 0
        self.skipped = 0  # steps in which it ran and got no rows
        self.blocked_on: bytes | None = None  # key of the page that another sequence is computing for it
        self.pages_indexed = 0
        self.exit: ExitState | None = None
        self._root = root
        self._keys: list[bytes] = []

    @property
    def tokens(self) -> np.ndarray:
        """int32 [length], a view."""
        return self._tokens[:self.length]

    @property
    def pending(self) -> int:
        return self.length - self.table.length

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.length > self.prompt_length

    @property
    def drafts(self) -> bool:
        """Its next token comes from drafts and a check."""
        return self.exit is not None and self.exit.plan.early.drafts and self.decoding

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first when rows or pages are short. Three preemptions make a batch request urgent."""
        return (Priority.INTERACTIVE if self.preemptions >= 3 else self.priority, self.order)

    def append(self, token: int) -> None:
        if self.length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty(len(self._tokens), np.int32)])
        self._tokens[self.length] = token
        self.length += 1

    def page_keys(self) -> list[bytes]:
        """Chained keys of all full pages of `tokens`."""
        return extend_keys(self._keys, self.tokens, self._root)

    def parent_key(self, page: int) -> bytes:
        return self._keys[page - 1] if page else self._root

    def reusable_keys(self) -> list[bytes]:
        """Keys of the pages that a cached prefix may give: the last token is always computed, for its logits, and
        every one where all hidden states or scores are wanted."""
        return [] if self.wants in (Wants.HIDDEN, Wants.SCORE) else self.page_keys()[:(self.length - 1) // PAGE_TOKENS]
