"""RoPE and the KV write: queries and keys are normed (qwen3) and rotated in place, keys and values go into the pages.

Operands of the kernel (`OPERANDS`, int64):
    counter        address of an int64 counter, 0 before the step: work is claimed from it
    step           address of the step state: SLICE_COUNT, SLICES, ROPE are read
    qkv, stride    float32 rows, stride bytes apart: H query heads, K key heads, K value heads of D each; queries and
                   keys are overwritten with the rotated ones
    kv_heads       K
    record_offset  bytes from a page to the layer's first record: layer * kv_heads * record_bytes
    q_norm, k_norm float32 [D] weights of the RMS norms over heads (read only where `qk_norm`)

A claim is (the rows of a slice that fall into one page, kv head): one thread alone writes a record.
Styles: "norm" rotates the pairs (2i, 2i + 1), "neox" the pairs (i, i + rotary / 2), of the first `rotary` dimensions.
"""
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from edge_runtime.kernels.attention_math import horizontal_max, load_padded, nan_of, vmax
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.kv_record import COLUMNS, TOKENS, RecordLayout, sources_digest
from edge_runtime.kernels.memory import fetch_add, i64_at
from edge_runtime.kernels.step_state import ROPE, SLICE_COUNT, SLICES
from edge_runtime.kernels.vector_ir import LANES, Emit, c64, f32, fill, i8, i16, i32, ints, micro_kernel, vec

OPERANDS = ("counter", "step", "qkv", "stride", "kv_heads", "record_offset", "q_norm", "k_norm")
STYLES = ("norm", "neox")


def _pieces(count: int) -> list[tuple[int, int]]:
    """(offset, lanes) that cover `count` floats: whole vectors, then powers of two."""
    pieces, at = [], 0
    while at < count:
        lanes = LANES
        while lanes > count - at:
            lanes //= 2
        pieces.append((at, lanes))
        at += lanes
    return pieces


def _norm(e: Emit, x, weight, size: int, eps: float) -> None:
    """RMS norm of float32 [size] in place."""
    b = e.b
    total = fill(0.0, f32, LANES)
    for d in range(0, size, LANES):
        part = load_padded(e, x, d, size)
        total = e.fma(part, part, total)
    mean = b.fadd(b.fmul(e.reduce_add(total), ir.Constant(f32, 1 / size)), ir.Constant(f32, eps))
    inverse = b.fdiv(ir.Constant(f32, 1.0), e.call("llvm.sqrt.f32", f32, [mean]))
    for at, lanes in _pieces(size):
        kind = vec(f32, lanes)
        scaled = b.fmul(e.load(x, 4 * at, kind, 4), e.splat(inverse, lanes))
        e.store(x, 4 * at, b.fmul(scaled, e.load(weight, 4 * at, kind, 4)), 4)


def _rotate(e: Emit, x, table, rotary: int, style: str) -> None:
    b, half = e.b, rotary // 2
    for at, lanes in _pieces(half):
        kind = vec(f32, lanes)
        cos, sin = e.load(table, 4 * at, kind, 4), e.load(table, 4 * (half + at), kind, 4)
        if style == "neox":
            first, second = e.load(x, 4 * at, kind, 4), e.load(x, 4 * (half + at), kind, 4)
        else:
            both = e.load(x, 8 * at, vec(f32, 2 * lanes), 4)
            first, second = e.shuffle(both, both, range(0, 2 * lanes, 2)), e.shuffle(both, both, range(1, 2 * lanes, 2))
        one = b.fsub(b.fmul(first, cos), b.fmul(second, sin))
        two = b.fadd(b.fmul(first, sin), b.fmul(second, cos))
        if style == "neox":
            e.store(x, 4 * at, one, 4)
            e.store(x, 4 * (half + at), two, 4)
        else:
            order = [i // 2 + (i % 2) * lanes for i in range(2 * lanes)]
            e.store(x, 8 * at, e.shuffle(one, two, order), 4)


def _codes(e: Emit, x, size: int):
    """int32 codes of float32 [size] in vectors of 16, and the scale: largest magnitude / 127."""
    b = e.b
    parts = [load_padded(e, x, d, size) for d in range(0, size, LANES)]
    top = e.absolute(parts[0])
    for part in parts[1:]:
        top = vmax(e, e.absolute(part), top)
    largest = horizontal_max(e, top)
    positive = b.fcmp_ordered(">", largest, ir.Constant(f32, 0.0))
    inverse = b.select(positive, b.fdiv(ir.Constant(f32, 127.0), largest), ir.Constant(f32, 0.0))
    inverse = e.splat(inverse, LANES)
    scale = b.fadd(b.fmul(largest, ir.Constant(f32, 1 / 127)), nan_of(e, parts))
    return [e.round_to_int(b.fmul(part, inverse)) for part in parts], scale


def write_int8(e: Emit, layout: RecordLayout, record, token, k, v) -> None:
    """Key and value float32 [D] of token 0..63 of the page into its record."""
    b = e.b
    column, lane = b.and_(token, c64(COLUMNS - 1)), b.lshr(token, c64(2))
    lane_at = b.mul(lane, c64(4))
    scale_at = b.add(b.mul(column, c64(4 * LANES)), lane_at)
    codes, scale = _codes(e, k, layout.head_size)
    e.store(record, b.add(scale_at, c64(layout.k_scale_at)), scale, 4)
    at = e.at(record, b.add(b.mul(column, c64(layout.column_bytes)), lane_at))
    for i, code in enumerate(codes):
        words = b.bitcast(b.trunc(code, vec(i8, LANES)), vec(i32, 4))
        for j in range(4):
            e.store(at, 64 * (4 * i + j), b.extract_element(words, ir.Constant(i32, j)), 4)
    codes, scale = _codes(e, v, layout.head_size)
    e.store(record, b.add(scale_at, c64(layout.v_scale_at)), scale, 4)
    shift = e.splat(b.mul(b.trunc(column, i32), ir.Constant(i32, 8)), LANES)
    kept = b.xor(b.shl(fill(255, i32, LANES), shift), fill(-1, i32, LANES))
    at = e.at(record, b.add(b.mul(lane, c64(4 * layout.padded)), c64(layout.v_at)))
    for i, code in enumerate(codes):
        byte = b.shl(b.and_(code, fill(255, i32, LANES)), shift)
        e.store(at, 64 * i, b.or_(b.and_(e.load(at, 64 * i, ints, 4), kept), byte), 4)


def write_fp16(e: Emit, layout: RecordLayout, record, token, k, v) -> None:
    """The same for fp16 records."""
    b = e.b
    column, lane = b.and_(token, c64(COLUMNS - 1)), b.lshr(token, c64(2))
    k_at = e.at(record, b.add(b.mul(column, c64(layout.column_bytes)), b.mul(lane, c64(2))))
    v_at = e.at(record, b.add(b.mul(token, c64(2 * layout.padded)), c64(layout.v_at)))
    for d in range(0, layout.head_size, LANES):
        words = b.bitcast(e.float_to_half(load_padded(e, k, d, layout.head_size)), vec(i16, LANES))
        for j in range(LANES):
            e.store(k_at, 2 * LANES * (d + j), b.extract_element(words, ir.Constant(i32, j)), 2)
        e.store(v_at, 2 * d, e.float_to_half(load_padded(e, v, d, layout.head_size)), 2)


def make_rope(head_size: int, group: int, kv_dtype: str, rotary: int, style: str, qk_norm: bool,
              eps: float) -> Callable:
    if style not in STYLES:
        raise ValueError(f"RoPE style {style!r}: must be one of {', '.join(STYLES)}")
    if not 0 < rotary <= head_size or rotary % 2:
        raise ValueError(f"rotary={rotary}: must be even, at least 2 and at most the head size, {head_size}")
    layout = RecordLayout(kv_dtype, head_size)
    record_size, head_bytes, row_bytes = layout.bytes, 4 * head_size, 4 * rotary

    def prepare(e, x, table, weight):
        if qk_norm:
            _norm(e, x, weight, head_size, eps)
        _rotate(e, x, table, rotary, style)

    rotate = micro_kernel(prepare)
    write = micro_kernel(lambda e, record, token, k, v: (write_int8 if layout.int8 else write_fp16)(
        e, layout, record, token, k, v))

    def rope(operands, thread, threads):
        counter, state, qkv = i64_at(operands, 0), i64_at(operands, 1), i64_at(operands, 2)
        stride, kv_heads, offset = i64_at(operands, 3), i64_at(operands, 4), i64_at(operands, 5)
        q_norm, k_norm = i64_at(operands, 6), i64_at(operands, 7)
        slices, count, table = i64_at(state, SLICES), i64_at(state, SLICE_COUNT), i64_at(state, ROPE)
        claim = fetch_add(counter, 1)
        before = 0  # claims of the slices before this one
        s = 0
        while s < count:
            position, rows = i64_at(slices, 4 * s + 2), i64_at(slices, 4 * s + 1)
            first_page = position >> 6
            claims = (((position + rows - 1) >> 6) - first_page + 1) * kv_heads
            if claim >= before + claims:
                before += claims
                s += 1
                continue
            page = (claim - before) // kv_heads
            head = claim - before - page * kv_heads
            page += first_page
            row = i64_at(slices, 4 * s) - position  # of position 0
            record = i64_at(i64_at(slices, 4 * s + 3), page) + offset + head * record_size
            for t in range(max(position, page * 64), min(position + rows, page * 64 + 64)):
                x = qkv + (row + t) * stride
                angles = table + (row + t) * row_bytes
                for g in range(group):
                    rotate(x + (head * group + g) * head_bytes, angles, q_norm)
                k = x + (kv_heads * group + head) * head_bytes
                rotate(k, angles, k_norm)
                write(record, t & (TOKENS - 1), k, k + kv_heads * head_bytes)
            claim = fetch_add(counter, 1)

    return rope


def rope_kernel(head_size: int, group: int, kv_dtype: str = "int8", rotary: int = 0, style: str = "norm",
                qk_norm: bool = False, eps: float = 1e-6, progress: Progress | None = None) -> int:
    """Address of `void(operands, thread, threads)`. rotary: dimensions rotated, 0 for all; eps: of the QK norms."""
    rotary = rotary or head_size
    norm = f"norm{eps!r}" if qk_norm else "plain"
    name = (f"rope-{head_size}-{group}-{kv_dtype}-{rotary}-{style}-{norm}-"
            f"{sources_digest('attention_math.py')}")
    return compile_kernel(name, lambda: make_rope(head_size, group, kv_dtype, rotary, style, qk_norm, eps), progress)
