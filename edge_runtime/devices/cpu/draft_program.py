"""Drafting at an exit and checking by the layers above, in one call: see `kernels.draft`."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.devices.base import Draft, Drafted
from edge_runtime.devices.cpu.attention import AttentionOperations
from edge_runtime.devices.cpu.program import ProgramBuilder
from edge_runtime.devices.cpu.weights import PackedMatrix
from edge_runtime.errors import DeviceError
from edge_runtime.kernels import draft, step_state
from edge_runtime.kernels.confidence import SCRATCH_FLOATS
from edge_runtime.kernels.draft import CONTROL_FIELDS, DRAFT
from edge_runtime.kernels.memory import aligned, operands
from edge_runtime.kernels.team import Program

_WORD = {name: i for i, name in enumerate(CONTROL_FIELDS)}


class DraftProgram:
    """`drafts` turns of the layers below `layer`, one more for the last draft, then the layers above for all."""

    def __init__(self, builder: ProgramBuilder, layer: int, drafts: int, head: PackedMatrix | None = None):
        """head: that names the drafts, instead of the model's own."""
        self._draft_head = head
        self.builder, self.layer, self.turns = builder, layer, drafts + 1
        self.config, self.buffers = builder.config, builder.buffers
        buffers, rows = self.buffers, self.buffers.rows
        self.most = rows // self.turns  # sequences at once
        self._drafts = aligned(self.most * DRAFT, np.int64).reshape(self.most, DRAFT)
        self._order = aligned(2 * rows, np.int64)
        self._states = aligned(self.most * self.turns * buffers.widths.x, np.float32)
        self._tokens = aligned(self.most * self.turns, np.int32).reshape(self.most, self.turns)
        self._row_owners, self._logit_owners = aligned(rows, np.int32), aligned(rows, np.int32)
        self._stop_below, self._sure = aligned(self.most, np.float32), aligned(self.most, np.float32)
        self._scratch = aligned(builder.threads * SCRATCH_FLOATS, np.float32)
        self.control = aligned(len(CONTROL_FIELDS), np.int64)
        self._set(step=buffers.state, drafts=self._drafts, turns=self.turns, x=buffers.x,
                  row_bytes=buffers.widths.x * 4, order=self._order, states=self._states, tokens=self._tokens,
                  row_owners=self._row_owners, logit_owners=self._logit_owners, stop_below=self._stop_below,
                  sure=self._sure, logits_bytes=buffers.widths.logits * 4, vocab=self.config.vocab_size,
                  padded=buffers.widths.logits, scratch=self._scratch)
        self._heads: list[tuple[np.ndarray, int]] = []
        self.program = self._build()

    def _set(self, **words: np.ndarray | int) -> None:
        for name, value in words.items():
            self.control[_WORD[name]] = value.ctypes.data if isinstance(value, np.ndarray) else value

    def _build(self) -> Program:
        b = self.builder
        b.prompts = False
        for turn in range(self.turns):
            self._kernel("turn", turn)
            b.embed()
            for i in range(self.layer):
                b.layer(i)
            if turn + 1 < self.turns:
                self._heads.append(b.head(self._draft_head))
                self._kernel("name", turn)
        self._kernel("check", self.turns)
        for i in range(self.layer, self.config.layers):
            b.layer(i)
        self._heads.append(b.head())
        b.prompts = True
        return b.take()

    def _kernel(self, name: str, turn: int) -> None:
        self.builder.add(name, draft.draft_kernel(name, self.builder.progress),
                         operands(draft.OPERANDS, counter=0, control=self.control.ctypes.data, turn=turn))

    def prepare(self, drafts: Sequence[Draft], attention: AttentionOperations) -> None:
        if not 1 <= len(drafts) <= self.most:
            raise DeviceError(f"{len(drafts)} sequences draft {self.turns - 1} tokens each: 1 to {self.most} at once")
        positions: list[int] = []
        for i, d in enumerate(drafts):
            if not 0 <= d.most < self.turns:
                raise DeviceError(f"{d.most} drafts: this program makes 0 to {self.turns - 1}")
            if not 0 <= d.token_id < self.config.vocab_size:
                raise DeviceError(f"token id {d.token_id}: this model's are 0 to {self.config.vocab_size - 1}")
            self._drafts[i] = (d.position, d.pages.ctypes.data, d.most, d.token_id, 0, 1, 0, 0)
            self._tokens[i, 0] = d.token_id
            self._stop_below[i] = d.stop_below
            positions += range(d.position, d.position + d.most + 1)
        self.buffers.reserve_logits(len(positions))
        self._set(count=len(drafts), logits=self.buffers.logits, rope_source=attention.angles_until(max(positions) + 1),
                  rope_bytes=attention.angle_bytes)
        attention.reserve(positions)
        for block, word in self._heads:
            block[word] = self.buffers.logits.ctypes.data
        self.buffers.state[step_state.HIDDEN_ROWS] = 0

    def results(self, count: int) -> tuple[Drafted, ...]:
        found, first = [], 0
        for i in range(count):
            rows = int(self._drafts[i, draft.ROWS_RUN])
            logits = self.buffers.logits[first:first + rows, :self.config.vocab_size]
            found.append(Drafted(self._tokens[i, 1:rows].copy(), logits))
            first += rows
        return tuple(found)
