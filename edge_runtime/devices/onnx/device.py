"""A model on an ONNX provider as the engine's device: its KV lives with the accelerator, whole steps run there.

As with llama.cpp, the engine's pages hold only token ids. Each step reads a sequence's history back from them and
brings one of the accelerator's sequences to that state, computing what it lacks or copying it from another sequence
with the same beginning; so sharing, forking, preempting and saving stay right, whatever the accelerator still holds.
"""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.devices.accelerator import AttendPart
from edge_runtime.devices.base import SequenceSlice, Step, StepResult
from edge_runtime.devices.llama_cpp import HISTORY_LAYOUT, _history
from edge_runtime.devices.onnx.accelerator import OnnxAccelerator
from edge_runtime.devices.onnx.kv import DeviceSequence
from edge_runtime.errors import DeviceError, OutOfMemoryError, TokenizerError

MIN_COPY = 16  # tokens of another sequence that are worth a copy instead of computing them


@dataclass(eq=False)
class _Slot:
    """A sequence of the accelerator and the tokens whose KV it holds."""

    sequence: DeviceSequence
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    used: int = 0
    spoiled: bool = False  # NaN may lie in its KV

    def shared(self, history: np.ndarray) -> int:
        """Leading tokens in common with `history`."""
        count = min(len(self.tokens), len(history))
        differs = np.flatnonzero(self.tokens[:count] != history[:count])
        return int(differs[0]) if len(differs) else count


@dataclass(eq=False)
class _Job:
    """A slice under way. start: first token to compute; wanted: rows at the end that logits are asked for; hidden: the
    same for hidden states; logits_at, hidden_at: their first rows in the result."""

    history: np.ndarray
    wanted: int
    hidden: int
    logits_at: int
    hidden_at: int
    slot: _Slot | None = None
    start: int = 0


class OnnxDevice:
    """See `devices.base.Device`. form: "whole" runs one session for all layers, "segments" one per layer.

    Rows of a step are products together, so a row's last digits may depend on how many there are. The device keeps as
    many sequences as its KV budget holds; a step that needs more runs in parts, and what had to leave is computed
    again.
    """

    uniform = True  # the pages hold token ids, the same however they came about
    kv_home = "device"

    def __init__(self, accelerator: OnnxAccelerator, form: str = "whole"):
        self.accelerator, self.form = accelerator, form
        self.vocab_size, self.max_rows = accelerator.vocab_size, accelerator.capabilities.max_rows
        self.kv_layout = HISTORY_LAYOUT
        self._slots: list[_Slot] = []
        self._step = 0
        self._current: Future[Any] | None = None

    def run(self, step: Step) -> StepResult:
        """Computes a step; see `devices.base.Device.run`."""
        if step.rows > self.max_rows:
            raise DeviceError(f"a step of {step.rows} rows: this device takes {self.max_rows}")
        for part in step.slices:
            _refuse_layers(part)
            ids = part.token_ids
            if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
                bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise TokenizerError(f"token id {bad}: this model's are 0 to {self.vocab_size - 1}")
        return self.accelerator.submit(lambda: self._run(step)).result()

    def close(self) -> None:
        self._slots.clear()
        self.accelerator.close()

    def _run(self, step: Step) -> StepResult:
        self._step += 1
        jobs, logit_rows, hidden_rows = _jobs(step)
        logits = np.empty((logit_rows, self.vocab_size), np.float32)
        hidden = np.empty((hidden_rows, self.accelerator.width), np.float32)
        waiting = list(jobs)
        try:
            while waiting:
                batch = self._place(waiting)
                self._compute(batch, logits, hidden)
                waiting = [job for job in waiting if job not in batch]
                for slot in [slot for slot in self._slots if slot.spoiled]:
                    self._drop(slot)
        except BaseException:
            self._forget()
            raise
        return StepResult(logits, hidden if hidden_rows else None)

    def _place(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Gives as many jobs as the KV budget allows a sequence with room for all their tokens."""
        placed: list[_Job] = []
        taken: set[int] = set()
        for job in sorted(jobs, key=lambda job: -max((s.shared(job.history) for s in self._slots), default=0)):
            free = [slot for slot in self._slots if id(slot) not in taken]
            slot = max(free, key=lambda s: (s.shared(job.history), -s.used), default=None)
            if slot is not None and slot.shared(job.history) < len(slot.tokens) and slot.used >= self._step - 1:
                slot = None  # rather a new one than the KV of a sequence that goes on
            slot = self._room(slot, len(job.history), taken)
            if slot is None:
                if not placed:
                    raise OutOfMemoryError(
                        f"{len(job.history)} tokens of one sequence do not fit the device's KV budget of "
                        f"{self.accelerator.kv.budget_bytes / 2**20:.1f} MiB. Give the KV more memory, or use a "
                        f"smaller context.")
                break
            taken.add(id(slot))
            self._begin(job, slot)
            placed.append(job)
        return placed

    def _room(self, slot: _Slot | None, tokens: int, taken: set[int]) -> _Slot | None:
        """The slot grown to `tokens`, or a new one; others leave for it, the longest unused first."""
        kv = self.accelerator.kv
        while True:
            try:
                if slot is not None:
                    kv.grow(slot.sequence, tokens)
                    return slot
                slot = _Slot(kv.open(tokens))
                self._slots.append(slot)
                return slot
            except OutOfMemoryError:
                others = [s for s in self._slots if id(s) not in taken and s is not slot]
                if others:
                    self._drop(min(others, key=lambda s: s.used))
                elif slot is not None and id(slot) not in taken:
                    self._drop(slot)  # there is no room for the old and the grown one at once
                    slot = None
                else:
                    return None

    def _begin(self, job: _Job, slot: _Slot) -> None:
        """Cuts the slot back to what it shares with the job's history, or copies more from another."""
        most = len(job.history) - max(1, job.wanted, job.hidden)
        keep = min(slot.shared(job.history), most)
        donor = max((s for s in self._slots if s is not slot), key=lambda s: s.shared(job.history), default=None)
        if donor is not None and min(donor.shared(job.history), most) >= keep + MIN_COPY:
            keep = min(donor.shared(job.history), most)
            self.accelerator.kv.copy(donor.sequence, slot.sequence, keep)
        slot.sequence.length, slot.tokens, slot.used = keep, job.history[:keep], self._step
        job.slot, job.start = slot, keep

    def _compute(self, jobs: Sequence[_Job], logits: np.ndarray, hidden: np.ndarray) -> None:
        """Rows of all jobs, at most `max_rows` a call; decoded tokens of different sequences in one call."""
        left = list(jobs)
        while left:
            parts, rows = [], 0
            for job in left:
                count = min(len(job.history) - job.start, self.max_rows - rows)
                if count > 0:
                    parts.append((job, count))
                    rows += count
            self._call(sorted(parts, key=lambda part: _order(*part)), logits, hidden)
            left = [job for job in left if job.start < len(job.history)]

    def _call(self, parts: Sequence[tuple[_Job, int]], logits: np.ndarray, hidden: np.ndarray) -> None:
        wanted: list[int] = []
        logit_rows: list[int] = []
        logits_to: list[int] = []
        hidden_to: list[tuple[int, int]] = []
        first = 0
        for job, count in parts:
            end = len(job.history)
            for i in range(count):
                at = job.start + i
                asked, shown = at >= end - job.wanted, at >= end - job.hidden
                if asked or shown:
                    if asked:
                        logit_rows.append(len(wanted))
                        logits_to.append(job.logits_at + at - (end - job.wanted))
                    if shown:
                        hidden_to.append((len(wanted), job.hidden_at + at - (end - job.hidden)))
                    wanted.append(first + i)
            first += count
        ids = np.concatenate([job.history[job.start:job.start + count] for job, count in parts])
        attend = [AttendPart(_slot(job).sequence, count) for job, count in parts]
        states, scores = self._forward(ids, attend, np.array(wanted, np.int64), np.array(logit_rows, np.int64))
        logits[logits_to] = scores
        for source, target in hidden_to:
            hidden[target] = states[source]
        for job, count in parts:
            job.start += count
            _slot(job).sequence.length = job.start
            _slot(job).tokens = job.history[:job.start]
        if not np.isfinite(states).all():  # what comes to stand in these rows must not see it
            for slot in {id(job.slot): _slot(job) for job, _ in parts}.values():
                slot.spoiled = True

    def _forward(self, ids: np.ndarray, parts: Sequence[AttendPart], rows: np.ndarray,
                 logit_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a = self.accelerator
        if self.form == "whole" and a.capabilities.whole:
            return a.whole(ids, parts, rows, logit_rows)
        positions = np.concatenate([np.arange(p.sequence.length, p.sequence.length + p.count) for p in parts])
        x, qkv = a.segment(0, a.embed(ids), None, positions)
        attended = a.attend(0, qkv, parts)
        for layer in range(1, a.layers):
            x, qkv = a.segment(layer, x, attended, positions)
            attended = a.attend(layer, qkv, parts)
        return a.head(x, attended, rows, logit_rows)

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self.accelerator.kv.close(slot.sequence)

    def _forget(self) -> None:
        """After a failure nobody knows what the buffers hold."""
        for slot in list(self._slots):
            slot.tokens = np.empty(0, np.int32)
            slot.sequence.length = 0


def _jobs(step: Step) -> tuple[list[_Job], int, int]:
    jobs, logits, hidden = [], 0, 0
    for part in step.slices:
        wanted = {"all": len(part.token_ids), "last": 1, "none": 0}[part.logits]
        shown = len(part.token_ids) if part.hidden else 0
        jobs.append(_Job(_history(part), wanted, shown, logits, hidden))
        logits, hidden = logits + wanted, hidden + shown
    return jobs, logits, hidden


def _refuse_layers(part: SequenceSlice) -> None:
    if part.exit is not None:
        raise DeviceError("early exit is not computed on ONNX devices: use device=\"cpu\"")


def _slot(job: _Job) -> _Slot:
    assert job.slot is not None
    return job.slot


def _order(job: _Job, count: int) -> tuple[int, int, int]:
    return (int(count > 1), *_slot(job).sequence.order)
