"""A step in which decoded rows may leave at exits: the program, the groups it walks, and what came out."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.devices.base import SequenceSlice, Step
from edge_runtime.devices.cpu.attention import AttentionOperations
from edge_runtime.devices.cpu.buffers import Buffers
from edge_runtime.devices.cpu.program import ProgramBuilder
from edge_runtime.errors import DeviceError
from edge_runtime.kernels import exit_gate, step_state
from edge_runtime.kernels.confidence import CRITERIA, SCRATCH_FLOATS
from edge_runtime.kernels.exit_gate import CONTROL_FIELDS, GROUP, GROUP_FIELDS, NO_CRITERION
from edge_runtime.kernels.memory import aligned, operands
from edge_runtime.kernels.team import Program
from edge_runtime.models.config import ModelConfig

_FIELD = {name: i for i, name in enumerate(GROUP_FIELDS)}
_WORD = {name: i for i, name in enumerate(CONTROL_FIELDS)}


class ExitProgram:
    """Layers up to each exit, the head there, the gate; at the end, where rows propagate, K and V of what left."""

    def __init__(self, builder: ProgramBuilder, exits: Sequence[int], propagates: bool):
        self.builder, self.exits, self.propagates = builder, tuple(exits), propagates
        config, buffers, rows = builder.config, builder.buffers, builder.buffers.rows
        self.config: ModelConfig = config
        self.buffers: Buffers = buffers
        ints = lambda count: aligned(max(1, count), np.int64)
        self._groups = ints(rows * GROUP).reshape(rows, GROUP)
        self._prompts, self._left_slices = ints(rows * 4).reshape(rows, 4), ints(rows * 4)
        self._prompt_logits = aligned(rows * 2, np.int32).reshape(rows, 2)
        self._prompt_hidden, self._owners, self._slots = (aligned(rows, np.int32) for _ in range(3))
        self._order, self._left_rows, self._left_counts = ints(2 * rows), ints(len(exits)), ints(len(exits))
        self._leave_layers = np.array(self.exits, np.int64)
        self._moved = aligned(rows * buffers.widths.x, np.float32)
        self._left = aligned(rows * buffers.widths.x if propagates else 1, np.float32)
        self._scratch = aligned(builder.threads * SCRATCH_FLOATS, np.float32)
        self._limits = aligned(rows * len(exits), np.float32).reshape(rows, len(exits))
        self._results = np.empty((0, buffers.widths.logits), np.float32)
        self._exits = np.empty(0, np.int32)
        self.control = ints(len(CONTROL_FIELDS))
        self._set(step=buffers.state, groups=self._groups, exits=len(exits), x=buffers.x,
                  row_bytes=buffers.widths.x * 4, moved=self._moved, order=self._order, candidate_groups=self._owners,
                  candidate_slots=self._slots, prompts=self._prompts, prompt_logits=self._prompt_logits,
                  prompt_hidden=self._prompt_hidden, tiles=int(builder.matrix_tiles), left=self._left,
                  left_slices=self._left_slices, left_rows=self._left_rows, left_counts=self._left_counts,
                  logits_bytes=buffers.widths.logits * 4, vocab=config.vocab_size, padded=buffers.widths.logits,
                  results_bytes=buffers.widths.logits * 4, leave_layers=self._leave_layers, scratch=self._scratch,
                  all_layers=config.layers)
        self._heads: list[tuple[np.ndarray, int]] = []
        self.program, self._hidden = self._build()

    def _set(self, **words: np.ndarray | int) -> None:
        for name, value in words.items():
            self.control[_WORD[name]] = value.ctypes.data if isinstance(value, np.ndarray) else value

    def _build(self) -> tuple[Program, tuple[np.ndarray, int]]:
        b, first = self.builder, 0
        self._kernel("gate", -1)
        b.embed()
        for at, layer in enumerate(self.exits):
            for i in range(first, layer):
                b.layer(i)
            self._heads.append(b.head())
            self._kernel("decide", at)
            self._kernel("gate", at)
            first = layer
        for i in range(first, self.config.layers):
            b.layer(i)
        hidden = b.hidden_states()
        self._heads.append(b.head())
        self._kernel("collect", len(self.exits))
        if self.propagates:
            for at, (low, high) in enumerate(zip(self.exits, (*self.exits[1:], self.config.layers))):
                self._kernel("rise", at)
                for i in range(low, high):
                    b.keys_and_values(i)
        return b.take(), hidden

    def _kernel(self, name: str, at: int) -> None:
        self.builder.add(name, exit_gate.exit_kernel(name, self.builder.progress),
                         operands(exit_gate.OPERANDS, counter=0, control=self.control.ctypes.data, exit=at))

    def prepare(self, step: Step, firsts: Sequence[int], hidden_rows: Sequence[int],
                attention: AttentionOperations) -> int:
        """Enters a step whose rows have been placed; returns the rows of its logits. hidden_rows: the rows whose
        hidden states are wanted, all of prompts."""
        decoded = [i for i, s in enumerate(step.slices) if not s.prompt]
        prompts = [i for i, s in enumerate(step.slices) if s.prompt]
        few = sum(len(step.slices[i].token_ids) for i in decoded)
        slots = self._slots_of(step)
        positions: list[int] = []
        most = step.rows
        for g, i in enumerate(decoded):
            s = step.slices[i]
            own = len(s.token_ids)
            pending = self._enter_group(g, s, firsts[i], slots[i])
            most += pending
            positions += range(s.position - pending, s.position + own)
        if most > self.buffers.rows:
            raise DeviceError(f"{most} rows, waiting states included: a step of this device takes {self.buffers.rows}")
        wanted = 0
        for at, i in enumerate(prompts):
            s = step.slices[i]
            own = len(s.token_ids)
            self._prompts[at] = (firsts[i] - few, own, s.position, s.pages.ctypes.data)
            for k in range(_wanted(s)):
                self._prompt_logits[wanted] = (firsts[i] - few + own - _wanted(s) + k, slots[i] + k)
                wanted += 1
        self._prompt_hidden[:len(hidden_rows)] = np.asarray(hidden_rows, np.int32) - few
        logits = step.logit_rows
        if len(self._results) < logits:
            self._results = aligned(logits * self.buffers.widths.logits, np.float32).reshape(logits, -1)
            self._exits = aligned(logits, np.int32)
        self.buffers.reserve_logits(logits)
        self._set(group_count=len(decoded), prompt_count=len(prompts), prompt_rows=step.rows - few,
                  prompt_logit_count=wanted, logits=self.buffers.logits, results=self._results,
                  exit_layers=self._exits, left_total=0, left_slice_total=0,
                  rope_source=attention.angles_until(max(s.position + len(s.token_ids) for s in step.slices)),
                  rope_bytes=attention.angle_bytes)
        attention.reserve(positions)
        for block, word in self._heads:
            block[word] = self.buffers.logits.ctypes.data
        block, word = self._hidden
        block[word] = self.buffers.hidden.ctypes.data
        self.buffers.state[step_state.HIDDEN_ROWS] = len(hidden_rows)
        return logits

    def _enter_group(self, g: int, s: SequenceSlice, first: int, slot: int) -> int:
        """Group `g` from slice `s`; returns its waiting states."""
        rule, own, row = s.exit, len(s.token_ids), self._groups[g]
        row[:] = 0
        row[_FIELD["position"]], row[_FIELD["pages"]], row[_FIELD["own"]] = s.position, s.pages.ctypes.data, own
        row[_FIELD["first"]], row[_FIELD["active"]] = first, own
        row[_FIELD["slot"]], row[_FIELD["logits"]] = slot, _wanted(s)
        row[_FIELD["criterion"]], row[_FIELD["first_exit"]] = NO_CRITERION, len(self.exits)
        if rule is None:
            return 0
        _check_rule(s, self.exits, self.buffers.widths.x)
        self._limits[g] = rule.limits
        used = [at for at, limit in enumerate(rule.limits) if limit < np.inf]
        row[_FIELD["criterion"]], row[_FIELD["propagate"]] = CRITERIA.index(rule.criterion), rule.propagate
        row[_FIELD["limits"]] = self._limits[g].ctypes.data
        if used:
            row[_FIELD["first_exit"]] = used[0]
        if not rule.propagate and rule.held is not None:
            row[_FIELD["held"]], row[_FIELD["pending"]] = rule.held.ctypes.data, rule.pending
            return rule.pending
        return 0

    def _slots_of(self, step: Step) -> list[int]:
        """The first logits row of each slice in the results, -1 where it has none."""
        slots, at = [], 0
        for s in step.slices:
            slots.append(at if s.logits != "none" else -1)
            at += _wanted(s)
        return slots

    def results(self, logits: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [logits, V] and layers run int32 [logits] of the step that has run."""
        return self._results[:logits, :self.config.vocab_size], self._exits[:logits]


def _wanted(s: SequenceSlice) -> int:
    return {"all": len(s.token_ids), "last": 1, "none": 0}[s.logits]


def _check_rule(s: SequenceSlice, exits: Sequence[int], width: int) -> None:
    rule, own = s.exit, len(s.token_ids)
    assert rule is not None
    if rule.criterion not in CRITERIA:
        raise DeviceError(f"exit criterion {rule.criterion!r}: one of {', '.join(CRITERIA)}")
    if len(rule.limits) != len(exits):
        raise DeviceError(f"{len(rule.limits)} exit limits: this device has {len(exits)} exits, {exits}")
    if s.logits == "none":
        raise DeviceError("a slice whose rows may leave early needs logits")
    if own > 1 and not (rule.criterion == "layer" and rule.propagate and s.logits == "all"):
        raise DeviceError(f"{own} rows that may leave early: more than one only by the rule \"layer\" with propagate "
                          f"and logits of all")
    if rule.propagate:
        return
    held = rule.held
    if (held is None or held.dtype != np.float32 or held.ndim != 2 or held.shape[1] != width
            or not held.flags.c_contiguous):
        raise DeviceError(f"held: float32 [capacity, {width}], C-contiguous")
    if not 0 <= rule.pending < len(held) or rule.pending > s.position:
        raise DeviceError(f"{rule.pending} waiting states before position {s.position}: `held` has room for {len(held)}"
                          f", one of them for this row")
