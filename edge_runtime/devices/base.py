"""What a device does for the engine: one `Step` in, logits out; and how one page of KV lies in memory."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

PAGE_TOKENS = 64  # one page of K scores 4 x 16 tokens without a horizontal sum; sharing granularity of prefixes
KV_DTYPES = ("int8", "fp16")


@dataclass(frozen=True)
class KVLayout:
    """How a page of 64 tokens lies in memory: one record per (layer, kv head), K, V and scales together.

    The record of (layer, head) starts at `page address + (layer * kv_heads + head) * record_bytes`. Inside a record
    the kernels decide: int8 holds K and V as 64 x Dp bytes each and 2 x 64 float32 scales (per token and head);
    fp16 holds K and V as 64 x Dp halves each. Dp is the head size padded up to a multiple of 16.
    """

    layers: int
    kv_heads: int
    head_size: int
    dtype: str = "int8"

    def __post_init__(self) -> None:
        if min(self.layers, self.kv_heads, self.head_size) < 1:
            raise ValueError(f"a KV layout needs positive sizes: {self}")
        if self.dtype not in KV_DTYPES:
            raise ValueError(f"KV dtype {self.dtype!r}: must be one of {', '.join(KV_DTYPES)}")

    @property
    def padded_head_size(self) -> int:
        return -(-self.head_size // 16) * 16

    @property
    def record_bytes(self) -> int:
        """A multiple of 64, so that every record is aligned when its page is."""
        values = PAGE_TOKENS * self.padded_head_size * 2
        return values + PAGE_TOKENS * 4 * 2 if self.dtype == "int8" else values * 2

    @property
    def page_bytes(self) -> int:
        return self.layers * self.kv_heads * self.record_bytes

    @property
    def bytes_per_token(self) -> int:
        return self.page_bytes // PAGE_TOKENS


@dataclass(frozen=True)
class ExitRule:
    """When decoded rows of a slice leave at an exit of the device (`Device.exit_layers`).

    criterion: "max_prob", "margin", "entropy" or "layer", see `early_exit.EarlyExit`.
    limits: one confidence per exit; a row leaves where its own is at least that; infinity: never, -infinity: always.
    propagate: the layers above get K and V of the state that leaves; else they get none, and the state waits in `held`.
    held: float32 [capacity, width], C-contiguous: states at the first exit that has a limit below infinity. Its first
        `pending` rows are those of the tokens right before the slice's that left and wait for a full pass; the device
        writes that of the slice's token behind them. The pass that goes on past that exit takes all of them along.
    """

    criterion: str
    limits: tuple[float, ...]
    propagate: bool = False
    held: np.ndarray | None = None
    pending: int = 0


@dataclass(frozen=True)
class SequenceSlice:
    """The rows that one sequence contributes to a step: consecutive tokens of a prompt chunk, or one decoded token.

    token_ids: int32 [n], n >= 1.
    position: index of the first of them in its sequence: the KV holds `position` tokens before the step and
        `position + n` after.
    pages: int64 [at least ceil((position + n) / 64)], addresses of the sequence's KV pages, 64-byte aligned. Pages
        that this slice writes belong to it alone; pages before may be shared with other sequences: read only.
    logits: which of the n rows need logits: "last", "all" or "none".
    hidden: the final-norm hidden states of all n rows are wanted too (embeddings).
    prompt: the rows are a prompt's, not a decoded token. A device may compute the two with different kernels (wide
        ones round differently), so it must know which, for a row's result not to depend on how many rows there are.
    key: names the sequence from step to step, for devices that keep something of it (see `Device.forget`).
    interactive: somebody waits for this token; else it belongs to work in bulk, which may wait.
    """

    token_ids: np.ndarray
    position: int
    pages: np.ndarray
    logits: str = "last"
    hidden: bool = False
    prompt: bool = False
    exit: ExitRule | None = None
    key: int = 0
    interactive: bool = True


@dataclass(frozen=True)
class Step:
    """Slices of different sequences, run together. No sequence appears twice in one step."""

    slices: tuple[SequenceSlice, ...]

    @property
    def rows(self) -> int:
        return sum(len(s.token_ids) for s in self.slices)

    @property
    def logit_rows(self) -> int:
        """Rows of `StepResult.logits`."""
        return sum({"all": len(s.token_ids), "last": 1, "none": 0}[s.logits] for s in self.slices)


@dataclass(frozen=True)
class StepResult:
    """What a step gives back. The arrays belong to the device, which may reuse them in its next `run`: copy what must
    live longer.

    logits: float32 [Step.logit_rows, V], in slice order ([0, V] where nobody asked).
    hidden: float32 [rows of the slices with hidden=True, width], states after the final norm, in slice order; None
        where no slice asked. Pooling is the engine's.
    exits: int32 [Step.logit_rows], layers that each of these rows has passed; None where no slice has a rule.
    finished: indices of the slices that were computed, ascending; the other arrays are of these alone, and the others
        come again in the next step. None: all.
    """

    logits: np.ndarray
    hidden: np.ndarray | None = None
    exits: np.ndarray | None = None
    finished: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Draft:
    """One sequence that drafts at an exit: its last token, not yet computed, and where its KV lies.

    pages: as in a slice, with room for `most` more tokens after the first. most: drafts at most. stop_below: drafting
    ends before the most where the last draft's probability is below this.
    """

    token_id: int
    position: int
    pages: np.ndarray
    most: int
    stop_below: float = 0.0


@dataclass(frozen=True)
class Drafted:
    """What `Device.speculate` found for one sequence: `tokens` int32 [n], the drafts; `logits` float32 [n + 1, V], the
    full model's after the first token and after each draft; all layers hold KV of these n + 1 positions."""

    tokens: np.ndarray
    logits: np.ndarray


class Device(Protocol):
    """A loaded model on a device.

    A row's logits depend on its own sequence alone, never on what else is in the step or on how a prompt was cut
    into chunks: seeds, prefix reuse and preemption rest on it. `run` is called by one thread at a time and writes
    nothing but the pages of its slices; an exception from it fails the requests of that step, and `run` may be
    called again.

    A device may also have `exit_layers`, a tuple of layers after which decoded rows may leave (`SequenceSlice.exit`)
    and at which `speculate(layer, drafts: tuple[Draft, ...]) -> tuple[Drafted, ...]` drafts greedily and checks with
    the layers above, whose logits are those of `run`, bit for bit. Empty or missing: it has no exits.

    A device may also have `forget(key)`: the sequence of that key (`SequenceSlice.key`) ends or gives its pages back;
    from then on the device touches neither. Such a device may leave slices unfinished (`StepResult.finished`): it
    remembers how far it came with them, and every step brings at least one of them to its end.

    A device may also have `uniform = True`: it computes prompt rows and decoded rows alike, bit for bit, so the KV of
    generated tokens may serve as another sequence's prompt. Without it only prompts' KV is shared.
    """

    vocab_size: int
    max_rows: int  # rows that one step may carry

    @property
    def kv_layout(self) -> KVLayout: ...

    def run(self, step: Step) -> StepResult: ...

    def close(self) -> None: ...
