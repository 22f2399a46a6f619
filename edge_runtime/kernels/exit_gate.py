"""Early exit inside a step: who leaves at an exit, who joins there, and the tables of those that go on.

A group is the decoded rows of one slice. Rows of a step lie group by group, prompts after them. At an exit the head has
read the rows that may leave (`candidates`); `decide` compares their confidence with the group's limit and keeps the
logits of those that leave; `gate` takes them out, closes the gaps, lets waiting states of groups that go on join, and
rebuilds what the kernels of the layers above read. `collect` keeps the logits of the rest, `rise` hands states that
left to the kernels that write only K and V.

Groups, int64 [n, GROUP]: see `GROUP_FIELDS`. position and pages: of the slice's first row. pending, held: waiting
states before it, their address. own: the slice's rows. first, active: where its rows are now and how many (0: left).
slot: of its first row's logits in the results, -1 for none; logits: of how many of its last rows.

Control, int64: see `CONTROL_FIELDS`; addresses and counts that are the same for all kernels of a program.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.confidence import LAYER, SCRATCH_FLOATS, row_confidence
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.kv_record import sources_digest
from edge_runtime.kernels.memory import copy_bytes, f32_at, fetch_add, i32_at, i64_at, set_i32, set_i64
from edge_runtime.kernels.row_tables import enter_rows
from edge_runtime.kernels.step_state import (
    FEW_ROWS,
    HIDDEN_INDEX,
    HIDDEN_ROWS,
    LOGIT_INDEX,
    LOGIT_ROWS,
    MANY_ROWS,
    PREFILL_COUNT,
    PREFILL_TASKS,
    ROPE,
    ROWS,
    SLICE_COUNT,
    SLICES,
)

GROUP_FIELDS = ("position", "pages", "own", "pending", "held", "criterion", "limits", "propagate", "first_exit", "slot",
                "logits", "first", "active", "joined", "leaves", "unused")
(POSITION, PAGES, OWN, PENDING, HELD, CRITERION, LIMITS, PROPAGATE, FIRST_EXIT, SLOT, LOGITS, FIRST, ACTIVE, JOINED,
 LEAVES, _) = range(len(GROUP_FIELDS))
GROUP = len(GROUP_FIELDS)
NO_CRITERION = -1

# prompts: int64 [n, 4], slices whose first row counts from the prompts' first; prompt_logits: int32 [n, 2], row and
# slot likewise; prompt_hidden: int32 rows. left, left_slices: states that left for `rise` and their slices, in order of
# the exits; left_rows, left_counts: int64 [exits], how many there are up to each. leave_layers: int64 [exits].
CONTROL_FIELDS = (
    "step", "groups", "group_count", "exits", "x", "row_bytes", "rope_source", "rope_bytes", "moved", "order",
    "candidate_groups", "candidate_slots", "prompts", "prompt_count", "prompt_rows", "prompt_logits",
    "prompt_logit_count", "prompt_hidden", "tiles", "left", "left_slices", "left_rows", "left_counts", "left_total",
    "left_slice_total", "logits", "logits_bytes", "vocab", "padded", "results", "results_bytes", "exit_layers",
    "leave_layers", "scratch", "all_layers")
(STEP, GROUPS, GROUP_COUNT, EXITS, X, ROW_BYTES, ROPE_SOURCE, ROPE_BYTES, MOVED, ORDER, CANDIDATE_GROUPS,
 CANDIDATE_SLOTS, PROMPTS, PROMPT_COUNT, PROMPT_ROWS, PROMPT_LOGITS, PROMPT_LOGIT_COUNT, PROMPT_HIDDEN, TILES, LEFT,
 LEFT_SLICES, LEFT_ROWS, LEFT_COUNTS, LEFT_TOTAL, LEFT_SLICE_TOTAL, LOGITS_AT, LOGITS_BYTES, VOCAB, PADDED, RESULTS,
 RESULTS_BYTES, EXIT_LAYERS, LEAVE_LAYERS, SCRATCH, ALL_LAYERS) = range(len(CONTROL_FIELDS))

OPERANDS = ("counter", "control", "exit")  # exit: index of the exit; of `gate`, -1 before the first layer


def make_decide() -> Callable:
    confident = row_confidence()

    def decide(op, thread, threads):
        control, at = i64_at(op, 1), i64_at(op, 2)
        rows = i64_at(i64_at(control, STEP), LOGIT_ROWS)
        counter, scratch = i64_at(op, 0), i64_at(control, SCRATCH) + thread * SCRATCH_FLOATS * 4
        while True:
            m = fetch_add(counter, 1)
            if m >= rows:
                break
            group = i64_at(control, GROUPS) + 8 * GROUP * i32_at(i64_at(control, CANDIDATE_GROUPS), m)
            row = i64_at(control, LOGITS_AT) + m * i64_at(control, LOGITS_BYTES)
            criterion, limit = i64_at(group, CRITERION), f32_at(i64_at(group, LIMITS), at)
            if criterion == LAYER or confident(row, i64_at(control, VOCAB), i64_at(control, PADDED), criterion,
                                               scratch) >= limit:
                slot = i32_at(i64_at(control, CANDIDATE_SLOTS), m)
                copy_bytes(i64_at(control, RESULTS) + slot * i64_at(control, RESULTS_BYTES), row,
                           i64_at(control, VOCAB) * 4)
                set_i32(i64_at(control, EXIT_LAYERS), slot, i64_at(i64_at(control, LEAVE_LAYERS), at))
                set_i64(group, LEAVES, 1)

    return decide


def make_collect() -> Callable:
    def collect(op, thread, threads):
        control = i64_at(op, 1)
        rows, counter = i64_at(i64_at(control, STEP), LOGIT_ROWS), i64_at(op, 0)
        while True:
            m = fetch_add(counter, 1)
            if m >= rows:
                break
            slot = i32_at(i64_at(control, CANDIDATE_SLOTS), m)
            copy_bytes(i64_at(control, RESULTS) + slot * i64_at(control, RESULTS_BYTES),
                       i64_at(control, LOGITS_AT) + m * i64_at(control, LOGITS_BYTES), i64_at(control, VOCAB) * 4)
            set_i32(i64_at(control, EXIT_LAYERS), slot, i64_at(control, ALL_LAYERS))

    return collect


@cache
def _leave_and_join() -> Callable:
    """`(control, exit)`: rows of x as they are after the exit, in `moved`; returns how many, or -1 for no change."""
    from numba import njit

    def leave_and_join(control, at):
        groups, x, size = i64_at(control, GROUPS), i64_at(control, X), i64_at(control, ROW_BYTES)
        moved, rows, changed = i64_at(control, MOVED), 0, 0
        for g in range(i64_at(control, GROUP_COUNT)):
            group = groups + 8 * GROUP * g
            active, source = i64_at(group, ACTIVE), x + i64_at(group, FIRST) * size
            if active == 0:
                continue
            waits = i64_at(group, CRITERION) != NO_CRITERION and i64_at(group, PROPAGATE) == 0
            if waits and at == i64_at(group, FIRST_EXIT):
                copy_bytes(i64_at(group, HELD) + i64_at(group, PENDING) * size, source, size)
            if i64_at(group, LEAVES) != 0:
                if i64_at(group, PROPAGATE) != 0:
                    total, number = i64_at(control, LEFT_TOTAL), i64_at(control, LEFT_SLICE_TOTAL)
                    copy_bytes(i64_at(control, LEFT) + total * size, source, active * size)
                    entry = i64_at(control, LEFT_SLICES) + 32 * number
                    set_i64(entry, 0, total)
                    set_i64(entry, 1, active)
                    set_i64(entry, 2, i64_at(group, POSITION))
                    set_i64(entry, 3, i64_at(group, PAGES))
                    set_i64(control, LEFT_TOTAL, total + active)
                    set_i64(control, LEFT_SLICE_TOTAL, number + 1)
                set_i64(group, ACTIVE, 0)
                changed = 1
                continue
            set_i64(group, FIRST, rows)
            if waits and at == i64_at(group, FIRST_EXIT) and i64_at(group, PENDING) > 0:
                pending = i64_at(group, PENDING)
                copy_bytes(moved + rows * size, i64_at(group, HELD), pending * size)
                rows += pending
                set_i64(group, ACTIVE, active + pending)
                set_i64(group, JOINED, pending)
                changed = 1
            copy_bytes(moved + rows * size, source, active * size)
            rows += active
        return rows if changed != 0 else -1

    return njit(leave_and_join)


@cache
def _shift_prompts() -> Callable:
    """`(control, few, shift)`: rows of x and of the cosines that lie from row `few` on move by `shift` rows."""
    from numba import njit

    def shift_prompts(control, few, shift):
        state, count = i64_at(control, STEP), i64_at(control, PROMPT_ROWS)
        x, size, turn = i64_at(control, X), i64_at(control, ROW_BYTES), i64_at(control, ROPE_BYTES)
        for i in range(count):
            row = few + (i if shift < 0 else count - 1 - i)
            copy_bytes(x + (row + shift) * size, x + row * size, size)
            copy_bytes(i64_at(state, ROPE) + (row + shift) * turn, i64_at(state, ROPE) + row * turn, turn)
        tasks = i64_at(state, PREFILL_TASKS)
        for i in range(i64_at(state, PREFILL_COUNT)):
            set_i64(tasks, 4 * i, i64_at(tasks, 4 * i) + shift)

    return njit(shift_prompts)


@cache
def _enter() -> Callable:
    """`(control, few)`: the step's tables for `few` decoded rows and the prompts after them."""
    from numba import njit

    enter = enter_rows()

    def enter_groups(control, few):
        state, groups = i64_at(control, STEP), i64_at(control, GROUPS)
        slices, entries = i64_at(state, SLICES), 0
        for g in range(i64_at(control, GROUP_COUNT)):
            group = groups + 8 * GROUP * g
            if i64_at(group, ACTIVE) > 0:
                entry = slices + 32 * entries
                set_i64(entry, 0, i64_at(group, FIRST))
                set_i64(entry, 1, i64_at(group, ACTIVE))
                set_i64(entry, 2, i64_at(group, POSITION) - i64_at(group, JOINED))
                set_i64(entry, 3, i64_at(group, PAGES))
                entries += 1
        enter(state, entries, i64_at(control, ORDER), i64_at(control, ROPE_SOURCE), i64_at(control, ROPE_BYTES))
        prompts = i64_at(control, PROMPT_COUNT)
        for i in range(prompts):
            entry, source = slices + 32 * (entries + i), i64_at(control, PROMPTS) + 32 * i
            set_i64(entry, 0, i64_at(source, 0) + few)
            for field in range(1, 4):
                set_i64(entry, field, i64_at(source, field))
        rows = few + i64_at(control, PROMPT_ROWS)
        set_i64(state, SLICE_COUNT, entries + prompts)
        set_i64(state, ROWS, rows)
        tiles = i64_at(control, TILES)
        set_i64(state, FEW_ROWS, few if tiles != 0 else rows)
        set_i64(state, MANY_ROWS, rows - few if tiles != 0 else 0)

    return njit(enter_groups)


@cache
def _choose() -> Callable:
    """`(control, exit)`: the rows whose logits come next: those that may leave at `exit`, or, past the last, all that
    are wanted."""
    from numba import njit

    def choose(control, at):
        state, groups = i64_at(control, STEP), i64_at(control, GROUPS)
        index, owners = i64_at(state, LOGIT_INDEX), i64_at(control, CANDIDATE_GROUPS)
        slots, count, few, last = i64_at(control, CANDIDATE_SLOTS), 0, 0, at >= i64_at(control, EXITS)
        for g in range(i64_at(control, GROUP_COUNT)):
            group = groups + 8 * GROUP * g
            active = i64_at(group, ACTIVE)
            few += active
            if active == 0 or i64_at(group, SLOT) < 0:
                continue
            if not last and (i64_at(group, CRITERION) == NO_CRITERION or not f32_at(i64_at(group, LIMITS), at) < 1e30):
                continue
            logits = i64_at(group, LOGITS)
            for i in range(logits):
                set_i32(index, count, i64_at(group, FIRST) + active - logits + i)
                set_i32(owners, count, g)
                set_i32(slots, count, i64_at(group, SLOT) + i)
                count += 1
        if last:
            wanted = i64_at(control, PROMPT_LOGITS)
            for i in range(i64_at(control, PROMPT_LOGIT_COUNT)):
                set_i32(index, count, few + i32_at(wanted, 2 * i))
                set_i32(slots, count, i32_at(wanted, 2 * i + 1))
                count += 1
            hidden = i64_at(control, PROMPT_HIDDEN)
            for i in range(i64_at(state, HIDDEN_ROWS)):
                set_i32(i64_at(state, HIDDEN_INDEX), i, few + i32_at(hidden, i))
        set_i64(state, LOGIT_ROWS, count)

    return njit(choose)


def make_gate() -> Callable:
    leave_and_join, shift_prompts, enter, choose = _leave_and_join(), _shift_prompts(), _enter(), _choose()

    def gate(op, thread, threads):
        if thread != 0:
            return
        control, at = i64_at(op, 1), i64_at(op, 2)
        if at < 0:
            few = 0
            for g in range(i64_at(control, GROUP_COUNT)):
                few += i64_at(i64_at(control, GROUPS) + 8 * GROUP * g, ACTIVE)
            enter(control, few)
        else:
            before = i64_at(i64_at(control, STEP), ROWS) - i64_at(control, PROMPT_ROWS)
            rows = leave_and_join(control, at)
            if rows >= 0:
                if rows > before:
                    shift_prompts(control, before, rows - before)
                size = i64_at(control, ROW_BYTES)
                copy_bytes(i64_at(control, X), i64_at(control, MOVED), rows * size)
                if rows < before:
                    shift_prompts(control, before, rows - before)
                enter(control, rows)
            set_i64(i64_at(control, LEFT_ROWS), at, i64_at(control, LEFT_TOTAL))
            set_i64(i64_at(control, LEFT_COUNTS), at, i64_at(control, LEFT_SLICE_TOTAL))
        choose(control, at + 1)

    return gate


def make_rise() -> Callable:
    enter = enter_rows()

    def rise(op, thread, threads):
        """Rows are the states that left at this exit or a lower one; at the first exit, all are laid out."""
        if thread != 0:
            return
        control, at = i64_at(op, 1), i64_at(op, 2)
        state = i64_at(control, STEP)
        if at == 0:
            entries = i64_at(control, LEFT_SLICE_TOTAL)
            copy_bytes(i64_at(control, X), i64_at(control, LEFT),
                       i64_at(control, LEFT_TOTAL) * i64_at(control, ROW_BYTES))
            copy_bytes(i64_at(state, SLICES), i64_at(control, LEFT_SLICES), 32 * entries)
            enter(state, entries, i64_at(control, ORDER), i64_at(control, ROPE_SOURCE), i64_at(control, ROPE_BYTES))
        rows = i64_at(i64_at(control, LEFT_ROWS), at)
        set_i64(state, ROWS, rows)
        set_i64(state, FEW_ROWS, rows)
        set_i64(state, MANY_ROWS, 0)
        set_i64(state, SLICE_COUNT, i64_at(i64_at(control, LEFT_COUNTS), at))

    return rise


_MAKERS = {"decide": make_decide, "gate": make_gate, "collect": make_collect, "rise": make_rise}


def exit_kernel(name: str, progress: Progress | None = None) -> int:
    """Address of the kernel `decide`, `gate`, `collect` or `rise`."""
    sources = sources_digest("row_tables.py", "step_state.py", "confidence.py")
    return compile_kernel(f"exit {name} {current().name} {sources}", _MAKERS[name], progress)


