"""The CPU as a device: weights packed for its kernels, a step of any mix of sequences in one call without the GIL."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.devices.base import Draft, Drafted, KVLayout, SequenceSlice, Step, StepResult
from edge_runtime.devices.cpu.attention import AttentionOperations
from edge_runtime.devices.cpu.buffers import Buffers, working_bytes
from edge_runtime.devices.cpu.draft_head import DraftHead, worth_a_copy
from edge_runtime.devices.cpu.draft_program import DraftProgram
from edge_runtime.devices.cpu.exit_program import ExitProgram
from edge_runtime.devices.cpu.program import ProgramBuilder
from edge_runtime.devices.cpu.weights import PackedMatrix, PackedWeights, packed_bytes
from edge_runtime.errors import DeviceError, TokenizerError
from edge_runtime.kernels import step_state
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.team import Team
from edge_runtime.models.config import ModelConfig, rope_factors
from edge_runtime.models.gguf_file import GGUFFile

Progress = Callable[[str], None]


class CpuDevice:
    """A model on the CPU. See `devices.base.Device`; one step at a time.

    Rows of decoded tokens are multiplied with int8 activations, rows of prompts in bf16 where the processor has
    matrix tiles; a row's result depends on nothing else in the step.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, *, threads: int | None = None, kv: str = "int8",
                 max_rows: int = 512, exits: Sequence[int] | None = None, progress: Progress | None = None):
        """exits: layers after which decoded rows may leave; None: those that the file names."""
        if not 1 <= max_rows <= 65536:
            raise DeviceError(f"max_rows={max_rows}: must be 1 to 65536")
        self.config, self.max_rows, self.vocab_size = config, max_rows, config.vocab_size
        self.kv_layout = KVLayout(config.layers, config.kv_heads, config.head_size, kv)
        self.isa = current()
        self._file = file
        self._team = Team(threads, progress)
        self.threads = self._team.threads
        self._weights = PackedWeights(file, config, self._team, progress)
        float_rows = any(matrix.is_float for matrix in self._weights.matrices.values())
        self._buffers = Buffers(config, max_rows, self.threads, self.isa.matrix_tiles, float_rows)
        self._attention = AttentionOperations(config, self.kv_layout, self._buffers, self.threads,
                                              rope_factors(file, config), progress)
        self._builder = ProgramBuilder(file, config, self._weights, self._buffers, self._attention, self.threads,
                                       progress)
        self._program, self._outputs = self._builder.build()
        self.exit_layers = tuple(config.exit_layers if exits is None else exits)
        if list(self.exit_layers) != sorted({e for e in self.exit_layers if 0 < e < config.layers}):
            raise DeviceError(f"exits {self.exit_layers}: layers from 1 to {config.layers - 1}, ascending")
        self.state_width = self._buffers.widths.x
        self._exit_programs: dict[bool, ExitProgram] = {}
        self._draft_programs: dict[tuple[int, int], DraftProgram] = {}
        self._draft_head: DraftHead | None = None

    @classmethod
    def load(cls, file: GGUFFile, config: ModelConfig, **options) -> CpuDevice:
        return cls(file, config, **options)

    @staticmethod
    def weights_bytes(file: GGUFFile, config: ModelConfig) -> int:
        """Memory of the packed weights."""
        return packed_bytes(file, config)

    @staticmethod
    def working_bytes(config: ModelConfig, max_rows: int, threads: int) -> int:
        """Memory of a step's activations."""
        return working_bytes(config, max_rows, threads, current().matrix_tiles)

    def run(self, step: Step) -> StepResult:
        """Computes a step: writes KV into the slices' pages, returns logits and hidden states in slice order."""
        if step.rows > self.max_rows:
            raise DeviceError(f"a step of {step.rows} rows: this device takes {self.max_rows}")
        if not step.rows:
            return StepResult(np.empty((0, self.vocab_size), np.float32))
        if any(s.exit is not None for s in step.slices):
            return self._run_with_exits(step)
        firsts = self._place(step)
        logit_rows, hidden_rows = self._choose(step, firsts)
        self._team.run(self._program)
        buffers = self._buffers
        logits = buffers.logits[:logit_rows, :self.vocab_size]
        hidden = buffers.hidden[:hidden_rows, :self.config.width] if hidden_rows else None
        return StepResult(logits, hidden)

    def _run_with_exits(self, step: Step) -> StepResult:
        propagates = any(s.exit is not None and s.exit.propagate for s in step.slices)
        if propagates not in self._exit_programs:
            self._exit_programs[propagates] = ExitProgram(self._builder, self.exit_layers, propagates)
        program, buffers = self._exit_programs[propagates], self._buffers
        for s in step.slices:
            if s.exit is not None and s.prompt:
                raise DeviceError("rows of a prompt do not leave early")
            if s.hidden and not s.prompt:
                raise DeviceError("a step with early exits gives hidden states of prompts only")
        firsts = self._place(step)
        hidden = _numbers(step.slices, firsts, lambda s: len(s.token_ids) if s.hidden else 0)
        buffers.reserve_hidden(len(hidden))
        logit_rows = program.prepare(step, firsts, hidden, self._attention)
        self._team.run(program.program)
        logits, exits = program.results(logit_rows)
        return StepResult(logits, buffers.hidden[:len(hidden), :self.config.width] if hidden else None, exits)

    def speculate(self, layer: int, drafts: Sequence[Draft]) -> tuple[Drafted, ...]:
        """Drafts at exit `layer` and checks, see `devices.base.Device`. The logits belong to the device."""
        if layer not in self.exit_layers:
            raise DeviceError(f"draft layer {layer}: the exits of this device are {self.exit_layers}")
        key = (layer, max((d.most for d in drafts), default=0))
        if key not in self._draft_programs:
            self._draft_programs[key] = DraftProgram(self._builder, *key, head=self._head_of_drafts())
        program = self._draft_programs[key]
        program.prepare(drafts, self._attention)
        self._team.run(program.program)
        return program.results(len(drafts))

    def _head_of_drafts(self) -> PackedMatrix | None:
        head = self._builder.head_matrix
        if self._draft_head is None and worth_a_copy(head):
            self._draft_head = DraftHead(self._file, head, self._team, self._builder.progress)
        return None if self._draft_head is None else self._draft_head.matrix

    def _place(self, step: Step) -> list[int]:
        """Gives every slice its rows, decoded tokens first; fills token ids and the attention's tables."""
        buffers, state = self._buffers, self._buffers.state
        ids, firsts = buffers.token_ids, [0] * len(step.slices)
        order = [i for i, s in enumerate(step.slices) if not s.prompt]
        at = few = 0
        for prompts in (False, True):
            if prompts:
                few = at
                order = [i for i, s in enumerate(step.slices) if s.prompt]
            for i in order:
                tokens = step.slices[i].token_ids
                ids[at:at + len(tokens)] = tokens
                firsts[i] = at
                at += len(tokens)
        used = ids[:at]
        if int(used.min()) < 0 or int(used.max()) >= self.vocab_size:
            bad = used[(used < 0) | (used >= self.vocab_size)][0]
            raise TokenizerError(f"token id {bad}: this model's are 0 to {self.vocab_size - 1}")
        state[step_state.ROWS] = at
        state[step_state.FEW_ROWS] = few if self.isa.matrix_tiles else at
        state[step_state.MANY_ROWS] = at - few if self.isa.matrix_tiles else 0
        self._attention.plan(step.slices, firsts)
        return firsts

    def _choose(self, step: Step, firsts: list[int]) -> tuple[int, int]:
        """Which rows get logits, which hidden states."""
        logits = _numbers(step.slices, firsts, lambda s: {"all": len(s.token_ids), "last": 1, "none": 0}[s.logits])
        hidden = _numbers(step.slices, firsts, lambda s: len(s.token_ids) if s.hidden else 0)
        buffers, state = self._buffers, self._buffers.state
        buffers.logit_index[:len(logits)] = logits
        buffers.hidden_index[:len(hidden)] = hidden
        state[step_state.LOGIT_ROWS], state[step_state.HIDDEN_ROWS] = len(logits), len(hidden)
        buffers.reserve_logits(len(logits))
        buffers.reserve_hidden(len(hidden))
        for name, array in (("logits", buffers.logits), ("hidden", buffers.hidden)):
            block, index = self._outputs[name]
            block[index] = array.ctypes.data
        return len(logits), len(hidden)

    def close(self) -> None:
        self._team.close()
        self._weights.close()


def _numbers(slices: tuple[SequenceSlice, ...], firsts: list[int], count: Callable[[SequenceSlice], int]) -> list[int]:
    """The last `count(slice)` rows of every slice."""
    numbers: list[int] = []
    for s, first in zip(slices, firsts):
        end = first + len(s.token_ids)
        numbers += range(end - count(s), end)
    return numbers
