"""What the exits would have said: every decoded position of given sequences, at every exit and at the full depth.

Sequences are replayed with the tokens that the full model drew, many positions in one step. A replay at an exit lets
all rows leave there; the pass after it writes the exact KV again, so that all exits see the same prefix.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.devices.base import ExitRule, SequenceSlice, Step
from edge_runtime.offload.pages import PagePool, pages_for

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

CRITERIA = ("max_prob", "margin", "entropy")
LOGIT_BYTES = 64 << 20  # of a replayed step: as many rows as keep its logits in this
FEWEST_ROWS = 16
MOST_TOGETHER = 128  # sequences that are replayed token by token

Advance = Callable[[int, int], Any]  # (sequences done, of)


@dataclass(frozen=True)
class Decoded:
    """A sequence to replay. prompt: int32 [p], p >= 1, computed as a prompt; rows: int32 [n], n >= 1, the tokens that
    are decoded after it, each asking for the next; document: where it is from."""

    prompt: np.ndarray
    rows: np.ndarray
    document: int = 0


@dataclass(frozen=True)
class ExitTrace:
    """N decoded positions of S sequences, at E exits of a model of `layers` layers.

    confidence: criterion -> float32 [E, N]. wrong: bool [E, N], the exit's likeliest token is not the full model's,
    which is in tokens: int32 [N]. starts: int64 [S + 1], positions of sequence s are starts[s] to starts[s + 1].
    """

    exits: tuple[int, ...]
    layers: int
    confidence: dict[str, np.ndarray]
    wrong: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def positions(self) -> int:
        return int(self.starts[-1])

    def chosen(self, sequences: Sequence[int] | np.ndarray) -> ExitTrace:
        """The same of some sequences, in the order given."""
        spans = [np.arange(self.starts[s], self.starts[s + 1]) for s in sequences]
        index = np.concatenate(spans) if spans else np.empty(0, np.int64)
        starts = np.concatenate(([0], np.cumsum([len(span) for span in spans]))).astype(np.int64)
        return replace(self, confidence={name: values[:, index] for name, values in self.confidence.items()},
                       wrong=self.wrong[:, index], starts=starts, tokens=self.tokens[index])

    def leaves(self, criterion: str, limits: Sequence[float]) -> np.ndarray:
        """int64 [N], the exit's index at which each position leaves under one limit per exit; E: none, all layers."""
        passed = self.confidence[criterion] >= np.asarray(limits, np.float32)[:, None]
        return np.where(passed.any(axis=0), passed.argmax(axis=0), len(self.exits))

    def differs(self, left: np.ndarray) -> np.ndarray:
        """bool [N], whether a position that leaves as `leaves` says gets another token than from the full model."""
        padded = np.concatenate((self.wrong, np.zeros((1, self.positions), bool)))
        return padded[left, np.arange(self.positions)]

    def losses(self, differs: np.ndarray) -> np.ndarray:
        """float64 [S], the share of each sequence's positions."""
        return np.add.reduceat(differs.astype(np.float64), self.starts[:-1]) / np.diff(self.starts)

    def depth(self, left: np.ndarray) -> np.ndarray:
        """int64 [N], layers that each position has passed when it leaves."""
        return np.asarray([*self.exits, self.layers])[left]

    def with_cap(self, left: np.ndarray, max_pending: int) -> np.ndarray:
        """`left` where a position is made to pass all layers after `max_pending` in a row that did not."""
        out, full = left.copy(), len(self.exits)
        for first, last in zip(self.starts[:-1], self.starts[1:]):
            waiting = 0
            for at in range(first, last):
                waiting = 0 if out[at] == full or waiting >= max_pending else waiting + 1
                if not waiting:
                    out[at] = full
        return out


def confidences(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Criterion -> float32 [n] of logits float32 [n, V], as `early_exit.EarlyExit` defines them."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted, dtype=np.float32)
    total = p.sum(axis=1, dtype=np.float64)
    top = np.partition(p, -2, axis=1)[:, -2:] / total[:, None]
    # H = ln(total) - sum(p * shifted) / total, with p before its division.
    entropy = np.log(total) - np.einsum("ij,ij->i", p, shifted, dtype=np.float64) / total
    found = {"max_prob": top[:, 1], "margin": top[:, 1] - top[:, 0], "entropy": 1 - entropy / math.log(p.shape[1])}
    return {name: values.astype(np.float32) for name, values in found.items()}


def exits_of(llm: LLM) -> tuple[int, ...]:
    """The exits that an open model's device has."""
    return tuple(getattr(llm._loaded.device, "exit_layers", ()) or ())


def layers_of(llm: LLM) -> int:
    return int(llm._loaded.device.kv_layout.layers)


class Replay:
    """Replays sequences on an open model's device, between the steps of its engine."""

    def __init__(self, llm: LLM):
        self.llm, self.device = llm, llm._loaded.device
        self.exits, self.layers = exits_of(llm), layers_of(llm)
        self.rows = max(1, min(self.device.max_rows, max(FEWEST_ROWS, LOGIT_BYTES // (4 * self.device.vocab_size))))
        # Beside the engine's: no limit of its own, since it holds one group of sequences at a time.
        self._pool = PagePool(self.device.kv_layout, 1 << 50)

    def trace(self, decoded: Sequence[Decoded], advance: Advance | None = None) -> ExitTrace:
        """Every sequence at every exit."""
        confidence: dict[str, list[np.ndarray]] = {name: [] for name in CRITERIA}
        wrong: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        done = 0
        for group in self._groups(decoded):
            with _Pages(self._pool, group) as pages:
                self._prefill(group, pages)
                at_exits = []
                for number in range(len(self.exits)):
                    limits = [math.inf] * len(self.exits)
                    limits[number] = -math.inf
                    at_exits.append(self._pass(group, pages, ExitRule("layer", tuple(limits), propagate=True)))
                full = self._pass(group, pages, None)
            for name in CRITERIA:
                confidence[name].append(np.array([found.confidence[name] for found in at_exits]))
            wrong.append(np.array([found.tokens != full.tokens for found in at_exits]))
            tokens.append(full.tokens)
            done += len(group)
            if advance is not None:
                advance(done, len(decoded))
        starts = np.concatenate(([0], np.cumsum([len(one.rows) for one in decoded]))).astype(np.int64)
        return ExitTrace(self.exits, self.layers,
                         {name: np.concatenate(parts, axis=1) for name, parts in confidence.items()},
                         np.concatenate(wrong, axis=1), starts, np.concatenate(tokens))

    def propagated(self, decoded: Sequence[Decoded], criterion: str, candidates: Sequence[tuple[float, ...]],
                   advance: Advance | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per candidate's limits (tokens int32 [N], depth int32 [N]) of all positions, where states that leave are
        copied upward: later positions read what the copies left in the KV, so that each candidate runs token by token,
        many sequences at once."""
        ends = np.cumsum([0, *(len(one.rows) for one in decoded)])
        made = [(np.empty(ends[-1], np.int32), np.empty(ends[-1], np.int32)) for _ in candidates]
        together = min(self.rows, MOST_TOGETHER)
        for start in range(0, len(decoded), together):
            group = decoded[start:start + together]
            with _Pages(self._pool, group) as pages:
                self._prefill(group, pages)
                for limits, (tokens, depth) in zip(candidates, made):
                    rule = ExitRule(criterion, limits, propagate=True)
                    for at in range(max(len(one.rows) for one in group)):
                        live = [i for i, one in enumerate(group) if at < len(one.rows)]
                        found = self._run([SequenceSlice(
                            group[i].rows[at:at + 1], len(group[i].prompt) + at, pages.addresses[i], exit=rule)
                            for i in live])
                        places = ends[start + np.array(live)] + at
                        tokens[places], depth[places] = found.tokens, found.exits
            if advance is not None:
                advance(start + len(group), len(decoded))
        return made

    def _groups(self, decoded: Sequence[Decoded]) -> Iterator[list[Decoded]]:
        """Sequences whose rows fit one step together, or one that does not."""
        group: list[Decoded] = []
        rows = 0
        for one in decoded:
            if group and rows + len(one.rows) > self.rows:
                yield group
                group, rows = [], 0
            group.append(one)
            rows += len(one.rows)
        if group:
            yield group

    def _prefill(self, group: Sequence[Decoded], pages: _Pages) -> None:
        """All prompts into the KV, in steps as full as they get."""
        slices: list[SequenceSlice] = []
        room = self.device.max_rows
        for one, own in zip(group, pages.addresses):
            at = 0
            while at < len(one.prompt):
                count = min(room, len(one.prompt) - at)
                slices.append(SequenceSlice(one.prompt[at:at + count], at, own, logits="none", prompt=True))
                at, room = at + count, room - count
                if not room:
                    self._run(slices)
                    slices, room = [], self.device.max_rows
        if slices:
            self._run(slices)

    def _pass(self, group: Sequence[Decoded], pages: _Pages, rule: ExitRule | None, wanted: bool = True) -> _Seen:
        """All decoded rows of a group once. wanted: confidences too."""
        if sum(len(one.rows) for one in group) <= self.rows:
            return self._run([SequenceSlice(one.rows, len(one.prompt), own, logits="all", exit=rule)
                              for one, own in zip(group, pages.addresses)], wanted)
        (one,), (own,) = group, pages.addresses
        return _Seen.joined([
            self._run([SequenceSlice(one.rows[at:at + self.rows], len(one.prompt) + at, own, logits="all", exit=rule)],
                      wanted)
            for at in range(0, len(one.rows), self.rows)])

    def _run(self, slices: Sequence[SequenceSlice], wanted: bool = False) -> _Seen:
        """One step, on the engine's thread, which owns the device; what it returns is read before the next."""
        def run() -> _Seen:
            result = self.device.run(Step(tuple(slices)))
            exits = result.exits.copy() if result.exits is not None else np.full(
                len(result.logits), self.layers, np.int32)
            if not len(result.logits):
                return _Seen(np.empty(0, np.int32), exits, {})
            return _Seen(result.logits.argmax(axis=1).astype(np.int32), exits,
                         confidences(result.logits) if wanted else {})

        return self.llm.engine.call(run)


@dataclass(frozen=True)
class _Seen:
    """Of n rows: their likeliest tokens int32 [n], layers passed int32 [n], confidences float32 [n]."""

    tokens: np.ndarray
    exits: np.ndarray
    confidence: dict[str, np.ndarray]

    @classmethod
    def joined(cls, parts: Sequence[_Seen]) -> _Seen:
        return cls(np.concatenate([p.tokens for p in parts]), np.concatenate([p.exits for p in parts]),
                   {name: np.concatenate([p.confidence[name] for p in parts]) for name in parts[0].confidence})


class _Pages:
    """KV pages of a group of sequences, held while the group is replayed."""

    def __init__(self, pool: PagePool, group: Sequence[Decoded]):
        self.pool = pool
        self.held = [pool.alloc_many(pages_for(len(one.prompt) + len(one.rows))) for one in group]
        self.addresses = [pool.addresses(pages) for pages in self.held]

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        for pages in self.held:
            for page in pages:
                self.pool.release(page)
