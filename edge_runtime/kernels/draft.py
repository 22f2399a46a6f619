"""Self-speculation inside a step: turns of drafting at an exit, then one check by the layers above.

Every turn runs the shared layers for the last token of each sequence that still drafts; `name` reads the head's logits
and names the next token; `turn` keeps the states that left the shared layers and lays out the next turn's rows;
`check` lays out all of them as rows for the layers above, sequence by sequence.

Drafts, int64 [n, DRAFT]: see `DRAFT_FIELDS`. most: drafts at most; rows: rows run so far; drafting: 1 while another
turn follows; token: the next row's. Their tokens, int32 [n, turns], and states, float32 [n, turns, width].
"""
from __future__ import annotations

from collections.abc import Callable

from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.confidence import MAX_PROB, SCRATCH_FLOATS, row_argmax, row_confidence
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.kv_record import sources_digest
from edge_runtime.kernels.memory import copy_bytes, f32_at, fetch_add, i32_at, i64_at, set_f32, set_i32, set_i64
from edge_runtime.kernels.row_tables import enter_rows
from edge_runtime.kernels.step_state import (
    FEW_ROWS,
    LOGIT_INDEX,
    LOGIT_ROWS,
    MANY_ROWS,
    PREFILL_COUNT,
    ROWS,
    SLICE_COUNT,
    SLICES,
    TOKEN_IDS,
)

DRAFT_FIELDS = ("position", "pages", "most", "token", "rows", "drafting", "unused_1", "unused_2")
POSITION, PAGES, MOST, TOKEN, ROWS_RUN, DRAFTING = range(6)
DRAFT = len(DRAFT_FIELDS)
# owners: int32, the draft that each row, and each row of logits, belongs to; stop_below, sure: float32 per draft.
CONTROL_FIELDS = ("step", "drafts", "count", "turns", "x", "row_bytes", "rope_source", "rope_bytes", "order", "states",
                  "tokens", "row_owners", "logit_owners", "stop_below", "sure", "logits", "logits_bytes", "vocab",
                  "padded", "scratch")
(STEP, DRAFTS, COUNT, TURNS, X, ROW_BYTES, ROPE_SOURCE, ROPE_BYTES, ORDER, STATES, TOKENS, ROW_OWNERS, LOGIT_OWNERS,
 STOP_BELOW, SURE, LOGITS_AT, LOGITS_BYTES, VOCAB, PADDED, SCRATCH) = range(len(CONTROL_FIELDS))
OPERANDS = ("counter", "control", "turn")


def make_name() -> Callable:
    argmax, confident = row_argmax(), row_confidence()

    def name(op, thread, threads):
        control, counter = i64_at(op, 1), i64_at(op, 0)
        rows, width = i64_at(i64_at(control, STEP), LOGIT_ROWS), i64_at(control, VOCAB)
        scratch = i64_at(control, SCRATCH) + thread * SCRATCH_FLOATS * 4
        while True:
            m = fetch_add(counter, 1)
            if m >= rows:
                break
            owner = i32_at(i64_at(control, LOGIT_OWNERS), m)
            row = i64_at(control, LOGITS_AT) + m * i64_at(control, LOGITS_BYTES)
            token = argmax(row, width, i64_at(control, PADDED), scratch)
            set_i64(i64_at(control, DRAFTS) + 8 * DRAFT * owner, TOKEN, token)
            set_f32(i64_at(control, SURE), owner,
                    confident(row, width, i64_at(control, PADDED), MAX_PROB, scratch))

    return name


def _keep_states() -> Callable:
    """`(control, turn)`: the states of the rows of turn `turn`."""
    from numba import njit

    def keep_states(control, turn):
        size, turns = i64_at(control, ROW_BYTES), i64_at(control, TURNS)
        for row in range(i64_at(i64_at(control, STEP), ROWS)):
            owner = i32_at(i64_at(control, ROW_OWNERS), row)
            copy_bytes(i64_at(control, STATES) + (owner * turns + turn) * size, i64_at(control, X) + row * size, size)

    return njit(keep_states)


def make_turn() -> Callable:
    from numba import njit

    enter, keep_states = enter_rows(), _keep_states()

    def take_drafts(control, turn):
        for d in range(i64_at(control, COUNT)):
            draft = i64_at(control, DRAFTS) + 8 * DRAFT * d
            if i64_at(draft, DRAFTING) == 0:
                continue
            if turn > i64_at(draft, MOST) or not f32_at(i64_at(control, SURE), d) >= f32_at(
                    i64_at(control, STOP_BELOW), d):
                set_i64(draft, DRAFTING, 0)
            else:
                set_i32(i64_at(control, TOKENS), d * i64_at(control, TURNS) + turn, i64_at(draft, TOKEN))

    take_drafts = njit(take_drafts)

    def turn_kernel(op, thread, threads):
        if thread != 0:
            return
        control, turn = i64_at(op, 1), i64_at(op, 2)
        state = i64_at(control, STEP)
        if turn > 0:
            keep_states(control, turn - 1)
            take_drafts(control, turn)
        slices, rows, logits = i64_at(state, SLICES), 0, 0
        for d in range(i64_at(control, COUNT)):
            draft = i64_at(control, DRAFTS) + 8 * DRAFT * d
            if i64_at(draft, DRAFTING) == 0:
                continue
            entry = slices + 32 * rows
            set_i64(entry, 0, rows)
            set_i64(entry, 1, 1)
            set_i64(entry, 2, i64_at(draft, POSITION) + turn)
            set_i64(entry, 3, i64_at(draft, PAGES))
            set_i32(i64_at(state, TOKEN_IDS), rows, i64_at(draft, TOKEN))
            set_i32(i64_at(control, ROW_OWNERS), rows, d)
            set_i64(draft, ROWS_RUN, turn + 1)
            if turn < i64_at(draft, MOST):
                set_i32(i64_at(state, LOGIT_INDEX), logits, rows)
                set_i32(i64_at(control, LOGIT_OWNERS), logits, d)
                logits += 1
            rows += 1
        enter(state, rows, i64_at(control, ORDER), i64_at(control, ROPE_SOURCE), i64_at(control, ROPE_BYTES))
        set_i64(state, SLICE_COUNT, rows)
        set_i64(state, ROWS, rows)
        set_i64(state, FEW_ROWS, rows)
        set_i64(state, MANY_ROWS, 0)
        set_i64(state, PREFILL_COUNT, 0)
        set_i64(state, LOGIT_ROWS, logits)

    return turn_kernel


def make_check() -> Callable:
    enter, keep_states = enter_rows(), _keep_states()

    def check(op, thread, threads):
        if thread != 0:
            return
        control, turn = i64_at(op, 1), i64_at(op, 2)
        keep_states(control, turn - 1)
        state, size = i64_at(control, STEP), i64_at(control, ROW_BYTES)
        slices, rows, count = i64_at(state, SLICES), 0, i64_at(control, COUNT)
        for d in range(count):
            draft = i64_at(control, DRAFTS) + 8 * DRAFT * d
            own = i64_at(draft, ROWS_RUN)
            entry = slices + 32 * d
            set_i64(entry, 0, rows)
            set_i64(entry, 1, own)
            set_i64(entry, 2, i64_at(draft, POSITION))
            set_i64(entry, 3, i64_at(draft, PAGES))
            copy_bytes(i64_at(control, X) + rows * size,
                       i64_at(control, STATES) + d * i64_at(control, TURNS) * size, own * size)
            for i in range(own):
                set_i32(i64_at(state, LOGIT_INDEX), rows + i, rows + i)
            rows += own
        enter(state, count, i64_at(control, ORDER), i64_at(control, ROPE_SOURCE), i64_at(control, ROPE_BYTES))
        set_i64(state, SLICE_COUNT, count)
        set_i64(state, ROWS, rows)
        set_i64(state, FEW_ROWS, rows)
        set_i64(state, LOGIT_ROWS, rows)

    return check


_MAKERS = {"name": make_name, "turn": make_turn, "check": make_check}


def draft_kernel(name: str, progress: Progress | None = None) -> int:
    """Address of the kernel `name`, `turn` or `check`."""
    sources = sources_digest("row_tables.py", "step_state.py", "confidence.py")
    return compile_kernel(f"draft {name} {current().name} {sources}", _MAKERS[name], progress)
