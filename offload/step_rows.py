"""A step taken apart: slices in pieces that fit one call, and what was computed of each."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edge_runtime.devices.base import SequenceSlice, Step, StepResult

LOGIT_ROWS = {"last": 1, "none": 0}  # of a slice; "all" are as many as it has


def logit_rows(s: SequenceSlice) -> int:
    """Rows at the slice's end whose logits are wanted."""
    return LOGIT_ROWS.get(s.logits, len(s.token_ids))


def is_prompt(s: SequenceSlice) -> bool:
    return s.prompt or len(s.token_ids) != 1


def pieces(slices: Sequence[SequenceSlice], rows: int) -> Iterator[list[SequenceSlice]]:
    """Prompts in batches of at most `rows` rows, cut where need be."""
    batch: list[SequenceSlice] = []
    left = rows
    for s in slices:
        start, end = 0, len(s.token_ids)
        while start < end:
            stop = min(end, start + left)
            shown = s.logits if stop == end or s.logits == "all" else "none"
            batch.append(replace(s, token_ids=s.token_ids[start:stop], position=s.position + start, logits=shown,
                                 prompt=True))
            left, start = left - (stop - start), stop
            if not left:
                yield batch
                batch, left = [], rows
    if batch:
        yield batch


@dataclass(eq=False)
class StepRows:
    """Logits and final-norm states of the rows computed so far, by the index of their slice, piece after piece."""

    step: Step
    logits: dict[int, list[np.ndarray]] = field(default_factory=dict)
    hidden: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._index = {s.key: i for i, s in enumerate(self.step.slices)}

    def __contains__(self, key: int) -> bool:
        return self._index.get(key) in self.logits

    def add(self, key: int, logits: np.ndarray, hidden: np.ndarray) -> None:
        i = self._index[key]
        self.logits.setdefault(i, []).append(logits)
        self.hidden.setdefault(i, []).append(hidden)

    def result(self, vocabulary: int) -> StepResult:
        finished, slices = tuple(sorted(self.logits)), self.step.slices
        logits = [part for i in finished for part in self.logits[i]]
        hidden = [part for i in finished if slices[i].hidden for part in self.hidden[i]]
        return StepResult(np.concatenate([np.empty((0, vocabulary), np.float32), *logits]),
                          np.concatenate(hidden) if hidden else None,
                          finished=None if len(finished) == len(slices) else finished)
