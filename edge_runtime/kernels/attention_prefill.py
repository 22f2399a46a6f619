"""Prefill attention: rows of a prompt, causal within the slice and over the KV before it.

Operands of the kernel (`OPERANDS`, int64):
    counter        address of an int64 counter, 0 before the step: work is claimed from it
    step           address of the step state: PREFILL_COUNT, PREFILL_TASKS are read (see attention_tasks)
    q, q_stride    float32 rows, q_stride bytes apart: H query heads of D each at the start of a row, rotated
    kv_heads       K
    record_offset  bytes from a page to the layer's first record: layer * kv_heads * record_bytes
    out, out_stride  float32 rows, out_stride bytes apart: H heads of D each, written
    lse            float32 [rows, H], natural logarithm, written; 0: not wanted
    scratch, scratch_stride  address and bytes per thread, at least `prefill_scratch_bytes`, 64-byte aligned

A claim is a task (up to `prefill_rows` rows of one slice) and a kv head; all its rows visit a page while it is in
cache. What is computed for a row does not depend on the rows beside it: cutting a prompt elsewhere changes nothing.
"""
from __future__ import annotations

from collections.abc import Callable

from edge_runtime.kernels import attention_amx as amx
from edge_runtime.kernels.attention_block import (
    MAX_ROWS,
    Block,
    clear_block,
    finish_row,
    start_row,
)
from edge_runtime.kernels.attention_pages import page_step
from edge_runtime.kernels.attention_softmax import Visible
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.kv_record import PAGE_SOURCES, RecordLayout, sources_digest
from edge_runtime.kernels.memory import fetch_add, i64_at, set_i32
from edge_runtime.kernels.step_state import PREFILL_COUNT, PREFILL_TASKS
from edge_runtime.kernels.vector_ir import c64, micro_kernel

OPERANDS = ("counter", "step", "q", "q_stride", "kv_heads", "record_offset", "out", "out_stride", "lse", "scratch",
            "scratch_stride")
TASK_FIELDS = ("row", "rows", "position", "pages")
QUERIES = 256  # query rows x heads of a task: their state stays in the second-level cache


def prefill_rows(group: int) -> int:
    """Most rows of a task."""
    return max(16, min(128, QUERIES // group // 16 * 16))


def prefill_scratch_bytes(head_size: int, group: int, kv_dtype: str) -> int:
    """Scratch of one thread."""
    if current().matrix_tiles:
        tiles = amx.Tiles(RecordLayout(kv_dtype, head_size))
        return tiles.blocks + (1 - (-prefill_rows(group) * group // amx.ROWS)) * tiles.size
    block = Block(RecordLayout(kv_dtype, head_size), MAX_ROWS)
    return -(-prefill_rows(group) * group // MAX_ROWS) * block.size + block.temp_size


def make_prefill_vector(head_size: int, group: int, kv_dtype: str) -> Callable:
    layout = RecordLayout(kv_dtype, head_size)
    block = Block(layout, MAX_ROWS)
    size, record_size, limit, rows = block.size, layout.bytes, block.limit, MAX_ROWS
    head_bytes, fields = 4 * head_size, len(TASK_FIELDS)
    temp_at = prefill_scratch_bytes(head_size, group, kv_dtype) - block.temp_size

    clear = micro_kernel(lambda e, state: clear_block(e, block, state))
    start = micro_kernel(lambda e, state, row, query: start_row(e, block, state, row, query))
    step = micro_kernel(lambda e, page, following, state, temp, first, tokens: page_step(
        e, block, page, following, state, temp, Visible("all", first, tokens)))
    masked_step = micro_kernel(lambda e, page, following, state, temp, first, tokens: page_step(
        e, block, page, following, state, temp, Visible("rows", first, tokens)))
    finish = micro_kernel(lambda e, state, row, out, lse: finish_row(e, block, state, row, out, lse))

    def attention_prefill(operands, thread, threads):
        counter, state = i64_at(operands, 0), i64_at(operands, 1)
        q, q_stride, kv_heads = i64_at(operands, 2), i64_at(operands, 3), i64_at(operands, 4)
        offset, out, out_stride = i64_at(operands, 5), i64_at(operands, 6), i64_at(operands, 7)
        lse = i64_at(operands, 8)
        scratch = i64_at(operands, 9) + thread * i64_at(operands, 10)
        temp = scratch + temp_at
        tasks, claims = i64_at(state, PREFILL_TASKS), i64_at(state, PREFILL_COUNT) * kv_heads
        claim = fetch_add(counter, 1)
        while claim < claims:
            index = claim // kv_heads
            head = claim - index * kv_heads
            task = tasks + index * (fields * 8)
            row, count, position, pages = i64_at(task, 0), i64_at(task, 1), i64_at(task, 2), i64_at(task, 3)
            queries = count * group  # query f: row f // group, head f % group
            blocks = (queries + rows - 1) // rows
            for k in range(blocks):
                clear(scratch + k * size)
            for f in range(queries):
                r, k = f // group, f // rows
                g = f - r * group
                start(scratch + k * size, f - k * rows,
                      q + (row + r) * q_stride + (head * group + g) * head_bytes)
                set_i32(scratch + k * size + limit, f - k * rows, position + r + 1)
            inside = offset + head * record_size
            tokens = position + count
            page_count = (tokens + 63) >> 6
            page = i64_at(pages, 0) + inside
            for i in range(page_count):
                following = i64_at(pages, min(i + 1, page_count - 1)) + inside
                # Blocks whose last row stands before the page see nothing of it; those whose first row sees its
                # last token see all of it.
                first = max(0, i * 64 - position) * group // rows
                whole = min(blocks, (max(0, i * 64 + 63 - position) * group + rows - 1) // rows)
                for k in range(first, whole):
                    masked_step(page, following, scratch + k * size, temp, i * 64, min(64, tokens - i * 64))
                for k in range(max(first, whole), blocks):
                    step(page, following, scratch + k * size, temp, i * 64, 64)
                page = following
            for f in range(queries):
                r, k = f // group, f // rows
                at = (row + r) * kv_heads * group + head * group + f - r * group
                finish(scratch + k * size, f - k * rows,
                       out + (row + r) * out_stride + (head * group + f - r * group) * head_bytes,
                       lse + at * 4 if lse else 0)
            claim = fetch_add(counter, 1)

    return attention_prefill


def make_prefill_tiles(head_size: int, group: int, kv_dtype: str) -> Callable:
    layout = RecordLayout(kv_dtype, head_size)
    tiles = amx.Tiles(layout)
    size, record_size, limit, blocks_at = tiles.size, layout.bytes, tiles.limit, tiles.blocks
    head_bytes, fields, rows, turn_bytes = 4 * head_size, len(TASK_FIELDS), amx.ROWS, tiles.turn

    configure = micro_kernel(lambda e, scratch: amx.configure(e, tiles, scratch))
    release = micro_kernel(lambda e: amx.release(e))
    clear = micro_kernel(lambda e, state: amx.clear_block(e, tiles, state))
    start = micro_kernel(lambda e, state, row, query: amx.start_row(e, tiles, state, row, query))
    unpack = micro_kernel(lambda e, page, following, scratch, tokens: amx.unpack_page(
        e, tiles, page, following, scratch, tokens))
    step = micro_kernel(lambda e, page, scratch, before, state, after, turn, first: amx.page_step(
        e, tiles, page, scratch, (before, state, after), (turn, e.b.sub(c64(tiles.turn), turn)), first, False))
    masked_step = micro_kernel(lambda e, page, scratch, before, state, after, turn, first: amx.page_step(
        e, tiles, page, scratch, (before, state, after), (turn, e.b.sub(c64(tiles.turn), turn)), first, True))
    start_page = micro_kernel(lambda e, scratch, state, turn: amx.start_page(e, tiles, scratch, state, turn))
    end_page = micro_kernel(lambda e, scratch, state, turn: amx.end_page(e, tiles, scratch, state, turn))
    finish = micro_kernel(lambda e, state, row, out, lse: amx.finish_row(e, tiles, state, row, out, lse))

    def attention_prefill(operands, thread, threads):
        counter, state = i64_at(operands, 0), i64_at(operands, 1)
        q, q_stride, kv_heads = i64_at(operands, 2), i64_at(operands, 3), i64_at(operands, 4)
        offset, out, out_stride = i64_at(operands, 5), i64_at(operands, 6), i64_at(operands, 7)
        lse = i64_at(operands, 8)
        scratch = i64_at(operands, 9) + thread * i64_at(operands, 10)
        nothing = scratch + blocks_at  # takes the values of the block before the first
        states = nothing + size
        tasks, claims = i64_at(state, PREFILL_TASKS), i64_at(state, PREFILL_COUNT) * kv_heads
        claim = fetch_add(counter, 1)
        if claim >= claims:
            return
        configure(scratch)
        clear(nothing)
        while claim < claims:
            index = claim // kv_heads
            head = claim - index * kv_heads
            task = tasks + index * (fields * 8)
            row, count, position, pages = i64_at(task, 0), i64_at(task, 1), i64_at(task, 2), i64_at(task, 3)
            queries = count * group  # query f: row f // group, head f % group
            blocks = (queries + rows - 1) // rows
            for k in range(blocks):
                clear(states + k * size)
            for f in range(queries):
                r, k = f // group, f // rows
                g = f - r * group
                start(states + k * size, f - k * rows,
                      q + (row + r) * q_stride + (head * group + g) * head_bytes)
                set_i32(states + k * size + limit, f - k * rows, position + r + 1)
            inside = offset + head * record_size
            tokens = position + count
            page_count = (tokens + 63) >> 6
            page = i64_at(pages, 0) + inside
            for i in range(page_count):
                following = i64_at(pages, min(i + 1, page_count - 1)) + inside
                unpack(page, following, scratch, min(64, tokens - i * 64))
                # Blocks whose last row stands before the page see nothing of it; those whose first row sees its
                # last token see all of it.
                first = max(0, i * 64 - position) * group // rows
                whole = min(blocks, (max(0, i * 64 + 63 - position) * group + rows - 1) // rows)
                turn = 0
                start_page(scratch, states + first * size, turn)
                before = nothing
                for k in range(first, blocks):
                    here = states + k * size
                    after = states + min(k + 1, blocks - 1) * size
                    if k < whole:
                        masked_step(page, scratch, before, here, after, turn, i * 64)
                    else:
                        step(page, scratch, before, here, after, turn, i * 64)
                    before = here
                    turn = turn_bytes - turn
                end_page(scratch, before, turn_bytes - turn)
                page = following
            for f in range(queries):
                r, k = f // group, f // rows
                at = (row + r) * kv_heads * group + head * group + f - r * group
                finish(states + k * size, f - k * rows,
                       out + (row + r) * out_stride + (head * group + f - r * group) * head_bytes,
                       lse + at * 4 if lse else 0)
            claim = fetch_add(counter, 1)
        release()

    return attention_prefill


def attention_prefill_kernel(head_size: int, group: int, kv_dtype: str = "int8",
                             progress: Progress | None = None) -> int:
    """Address of `void(operands, thread, threads)`. head_size: D; group: query heads per kv head."""
    sources = sources_digest(*PAGE_SOURCES, "attention_amx.py")
    name = f"attention_prefill-{head_size}-{group}-{kv_dtype}-{sources}"
    make = make_prefill_tiles if current().matrix_tiles else make_prefill_vector
    return compile_kernel(name, lambda: make(head_size, group, kv_dtype), progress)
