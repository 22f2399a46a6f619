"""Any model that the runtime loads, asked for its logits at every position of a text: the teacher of a distillation."""
from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from types import TracebackType
from typing import Any

import numpy as np

from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.errors import InvalidRequestError
from edge_runtime.loading import load
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import PagePool, pages_for

PIECE_BYTES = 1 << 26  # of one step's logits


class Teacher:
    """A model on the CPU device with fp16 KV. Raises what `LLM` raises for its arguments.

    context: tokens of one text, at most what the model was made for.
    """

    def __init__(self, model: str | os.PathLike[str] | None, *, context: int, threads: int | None = None,
                 memory_budget: int | None = None, progress: Any = None):
        self._loaded = load(model, device="cpu", context=context, kv="fp16", threads=threads, max_batch=1,
                            memory_budget=memory_budget, progress=progress)
        device = self._loaded.device
        self.tokenizer, self.context, self.vocab_size = self._loaded.tokenizer, context, device.vocab_size
        self._rows = max(1, min(device.max_rows, PIECE_BYTES // (4 * self.vocab_size)))
        self._pool = PagePool(device.kv_layout, pages_for(context) * device.kv_layout.page_bytes)

    @property
    def fingerprint(self) -> str:
        """Names the weights."""
        return self._loaded.fingerprint()

    @property
    def tokenizer_fingerprint(self) -> str:
        """Names the vocabulary: two models that share it can be teacher and student."""
        return vocabulary_fingerprint(self.tokenizer)

    def logits(self, token_ids: np.ndarray) -> Iterator[np.ndarray]:
        """float32 [n, vocabulary] for consecutive positions of int32 [T], T in all; the next piece overwrites one."""
        if not 1 <= len(token_ids) <= self.context:
            raise InvalidRequestError("token_ids", len(token_ids), f"1 to {self.context} tokens, the teacher's context")
        table = PageTable(self._pool)
        try:
            for first in range(0, len(token_ids), self._rows):
                ids = np.asarray(token_ids[first : first + self._rows], np.int32)
                table.reserve(len(ids))
                piece = SequenceSlice(ids, table.length, table.addresses, "all", prompt=True)
                table.advance(len(ids))
                yield self._loaded.device.run(Step((piece,))).logits
        finally:
            table.release()

    def close(self) -> None:
        self._loaded.close()

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Of the tokens and merges, in order."""
    digest = blake2b(digest_size=16)
    for text in (*tokenizer.vocabulary.tokens, "", *tokenizer.vocabulary.merges):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
