"""Decode attention: every page of a sequence once, for all query heads of a kv head.

Operands of the kernel (`OPERANDS`, int64):
    counter        address of an int64 counter, 0 before the step: work is claimed from it
    step           address of the step state: TASK_COUNT, TASKS, PARTIALS, MERGES are read (see attention_tasks)
    q, q_stride    float32 rows, q_stride bytes apart: H query heads of D each at the start of a row, rotated
    kv_heads       K
    record_offset  bytes from a page to the layer's first record: layer * kv_heads * record_bytes
    out, out_stride  float32 rows, out_stride bytes apart: H heads of D each, written
    lse            float32 [rows, H], natural logarithm, written; 0: not wanted
    scratch, scratch_stride  address and bytes per thread, at least `decode_scratch_bytes`, 64-byte aligned

A task is a piece of one row's pages; a claim is a task and some neighbouring kv heads. Where a row has several pieces
the thread that finishes last merges them in order, so that the result depends on the row alone.
"""
from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.kernels import attention_amx_decode as amx
from edge_runtime.kernels.attention_amx import release as release_tiles
from edge_runtime.kernels.attention_block import (
    Block,
    block_rows,
    clear_block,
    finish_row,
    merge_rows,
    part_floats,
    save_row,
    start_row,
)
from edge_runtime.kernels.attention_pages import page_step
from edge_runtime.kernels.attention_prefetch import records_ahead
from edge_runtime.kernels.attention_softmax import Visible
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.kv_record import PAGE_SOURCES, RecordLayout, sources_digest
from edge_runtime.kernels.memory import aligned, fetch_add, i64_at, operands, set_i64
from edge_runtime.kernels.step_state import MERGES, NAMES, PARTIALS, TASK_COUNT, TASKS
from edge_runtime.kernels.vector_ir import micro_kernel

OPERANDS = ("counter", "step", "q", "q_stride", "kv_heads", "record_offset", "out", "out_stride", "lse", "scratch",
            "scratch_stride")
TILE_ROWS = 3  # rows of a block from which matrix tiles take less time than dot instructions
CLAIMS = 4  # per thread at least, where there are as many
RUN = 8  # most kv heads of a claim: their records lie one after another
TASK_FIELDS = ("row", "pages", "begin", "end", "tokens", "piece", "pieces", "slot")


def decode_scratch_bytes(head_size: int, group: int, kv_dtype: str) -> int:
    """Scratch of one thread."""
    rows = block_rows(group)
    block = Block(RecordLayout(kv_dtype, head_size), rows)
    return RUN * -(-group // rows) * block.size + block.temp_size


def make_attention_decode(head_size: int, group: int, kv_dtype: str) -> Callable:
    layout = RecordLayout(kv_dtype, head_size)
    rows = block_rows(group)
    block = Block(layout, rows)
    size, record_size = block.size, layout.bytes
    blocks = -(-group // rows)
    temp_at, head_bytes = RUN * blocks * size, 4 * head_size
    tiles = layout.int8 and rows >= TILE_ROWS and amx.int8_tiles()
    one_page = amx.page_step if tiles else page_step
    distance = records_ahead(current(), record_size)
    part_bytes = 4 * part_floats(head_size)
    fields = len(TASK_FIELDS)

    clear = micro_kernel(lambda e, state: clear_block(e, block, state))
    start = micro_kernel(lambda e, state, row, query: start_row(e, block, state, row, query))
    configure = micro_kernel(lambda e, temp: amx.configure(e, block, temp) if tiles else None)
    release = micro_kernel(lambda e: release_tiles(e) if tiles else None)
    step = micro_kernel(lambda e, page, following, state, temp, first, tokens: one_page(
        e, block, page, following, state, temp, Visible("tokens", first, tokens)))
    finish = micro_kernel(lambda e, state, row, out, lse: finish_row(e, block, state, row, out, lse))
    save = micro_kernel(lambda e, state, row, target: save_row(e, block, state, row, target))
    merge = micro_kernel(lambda e, parts, count, stride, out, lse: merge_rows(
        e, head_size, parts, count, stride, out, lse))

    def attention_decode(operands, thread, threads):
        counter, state = i64_at(operands, 0), i64_at(operands, 1)
        q, q_stride, kv_heads = i64_at(operands, 2), i64_at(operands, 3), i64_at(operands, 4)
        offset, out, out_stride = i64_at(operands, 5), i64_at(operands, 6), i64_at(operands, 7)
        lse = i64_at(operands, 8)
        scratch = i64_at(operands, 9) + thread * i64_at(operands, 10)
        temp = scratch + temp_at
        tasks, count = i64_at(state, TASKS), i64_at(state, TASK_COUNT)
        partials, arrivals = i64_at(state, PARTIALS), i64_at(state, MERGES)
        slot_bytes = kv_heads * group * part_bytes
        # Heads of a claim: as many as leave every thread some claims.
        run = min(RUN, kv_heads)
        while run > 1 and (kv_heads % run or count * (kv_heads // run) < CLAIMS * threads):
            run -= 1
        runs = kv_heads // run
        claim = fetch_add(counter, 1)
        if claim >= count * runs:
            return
        configure(temp)
        while claim < count * runs:
            index = claim // runs
            first_head = (claim - index * runs) * run
            task = tasks + index * (fields * 8)
            row, pages, begin, end = i64_at(task, 0), i64_at(task, 1), i64_at(task, 2), i64_at(task, 3)
            tokens, piece, pieces, slot = i64_at(task, 4), i64_at(task, 5), i64_at(task, 6), i64_at(task, 7)
            queries = q + row * q_stride + first_head * (group * head_bytes)
            target = out + row * out_stride + first_head * (group * head_bytes)
            log = lse + (row * kv_heads + first_head) * (group * 4)
            for k in range(run * blocks):
                clear(scratch + k * size)
            for f in range(run * group):
                h = f // group
                k = (f - h * group) // rows
                start(scratch + (h * blocks + k) * size, f - h * group - k * rows, queries + f * head_bytes)
            inside = offset + first_head * record_size
            # After the last page comes the claim that is likely next.
            likely = min(i64_at(counter, 0), count * runs - 1)
            task = tasks + likely // runs * (fields * 8)
            after = i64_at(i64_at(task, 1), i64_at(task, 2)) + offset + likely % runs * (run * record_size)
            page = i64_at(pages, begin) + inside
            for i in range(begin, end):
                following = i64_at(pages, i + 1) + inside if i + 1 < end else after
                later = following + record_size  # what is fetched when `distance` leads past `following`
                if run == 1:
                    later = i64_at(pages, i + 2) + inside if i + 2 < end else after
                for h in range(run):
                    record = page + h * record_size
                    ahead = later
                    if h + distance <= run:
                        ahead = record + distance * record_size if h + distance < run else following
                    for k in range(h * blocks, (h + 1) * blocks):
                        step(record, ahead, scratch + k * size, temp, i * 64, min(64, tokens - i * 64))
                page = following
            if pieces == 1:
                for f in range(run * group):
                    h = f // group
                    k = (f - h * group) // rows
                    finish(scratch + (h * blocks + k) * size, f - h * group - k * rows, target + f * head_bytes,
                           log + f * 4 if lse else 0)
            else:
                parts = partials + slot * slot_bytes + first_head * (group * part_bytes)
                for f in range(run * group):
                    h = f // group
                    k = (f - h * group) // rows
                    save(scratch + (h * blocks + k) * size, f - h * group - k * rows,
                         parts + piece * slot_bytes + f * part_bytes)
                arrived = arrivals + (slot * kv_heads + first_head) * 8
                if fetch_add(arrived, 1) == pieces - 1:
                    set_i64(arrived, 0, 0)
                    for f in range(run * group):
                        merge(parts + f * part_bytes, pieces, slot_bytes, target + f * head_bytes,
                              log + f * 4 if lse else 0)
            claim = fetch_add(counter, 1)
        release()

    return attention_decode


def attention_decode_kernel(head_size: int, group: int, kv_dtype: str = "int8",
                            progress: Progress | None = None) -> int:
    """Address of `void(operands, thread, threads)`. head_size: D; group: query heads per kv head."""
    sources = sources_digest(*PAGE_SOURCES, "attention_amx_decode.py")
    name = f"attention_decode-{head_size}-{group}-{kv_dtype}-{sources}"
    return compile_kernel(name, lambda: make_attention_decode(head_size, group, kv_dtype), progress)


def decode_attention(q: np.ndarray, pages: Sequence[np.ndarray], tokens: Sequence[int], kv_heads: int,
                     kv_dtype: str = "int8", *, record_offset: int = 0, threads: int = 1,
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one query row per sequence over its pages, outside of a step: what split placement merges.

    q: float32 [B, H, D], rotated. pages: B arrays of page addresses, int64; tokens: how many tokens of them each row
    sees, at least 1. record_offset: layer * kv_heads * record_bytes.
    Returns o float32 [B, H, D] and lse float32 [B, H], natural logarithm of the sum of exponentials.
    """
    from edge_runtime.kernels.attention_tasks import AttentionTasks

    rows, heads, head_size = q.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads: must be a multiple of the {kv_heads} kv heads")
    tables = [np.ascontiguousarray(p, np.int64) for p in pages]
    for table, count in zip(tables, tokens):
        if not 0 < count <= len(table) * 64:
            raise ValueError(f"tokens={count}: must be at least 1 and at most {len(table)} pages x 64")
    group = heads // kv_heads
    slices = np.array([(i, 1, count - 1, t.ctypes.data) for i, (t, count) in enumerate(zip(tables, tokens))], np.int64)
    tasks = AttentionTasks(head_size, group, kv_heads)
    tasks.build(slices, rows)
    step = np.zeros(len(NAMES), np.int64)
    tasks.write(step)
    q = np.ascontiguousarray(q, np.float32)
    o, lse = np.empty(q.shape, np.float32), np.empty((rows, heads), np.float32)
    stride = -(-decode_scratch_bytes(head_size, group, kv_dtype) // 64) * 64
    scratch, counter = aligned(stride * threads, np.uint8), aligned(8, np.int64)
    block = operands(
        OPERANDS, counter=counter.ctypes.data, step=step.ctypes.data, q=q.ctypes.data, q_stride=4 * heads * head_size,
        kv_heads=kv_heads, record_offset=record_offset, out=o.ctypes.data, out_stride=4 * heads * head_size,
        lse=lse.ctypes.data, scratch=scratch.ctypes.data, scratch_stride=stride)
    signature = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    kernel = signature(attention_decode_kernel(head_size, group, kv_dtype))
    team = [threading.Thread(target=kernel, args=(block.ctypes.data, t, threads)) for t in range(1, threads)]
    for thread in team:
        thread.start()
    kernel(block.ctypes.data, 0, threads)
    for thread in team:
        thread.join()
    return o, lse
