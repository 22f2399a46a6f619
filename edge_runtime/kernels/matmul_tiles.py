"""Matrix products from quantized tiles (see `tiles`) and int8 activations: exact integer sums, float32 scales.

Serves every step on processors without matrix tiles and steps of few rows on all. A tile is unpacked in registers and
used for up to `isa.columns` activation rows. With one row it is a question of bandwidth: tiles are walked in address
order, each thread claims contiguous ranges.

With `passes` = 2 an activation is two int8 vectors, itself and what its rounding left: 15 bits. The loads of weights,
which a single row waits for, stay the same.

Activations: `x` int8 [M, K], `x_scale` float32 [M, K/32], `x_sum` int32 [M, K/32] and `x_half` int32 [M, K/16] hold
MINUS the sums of 32 and of 16 codes, so that zero points cost one shift.
"""
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from edge_runtime.kernels import memory, step_state
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.memory import fetch_add, i64_at
from edge_runtime.kernels.tiles import FORMATS, ROWS, STEPS, TileFormat
from edge_runtime.kernels.vector_ir import (
    LANES,
    Emit,
    bytes64,
    c64,
    f16,
    f32,
    fill,
    i8,
    i16,
    i32,
    micro_kernel,
    vec,
    wide,
)

OPERANDS = ("counter", "step", "rows_at", "weights", "row_blocks", "row_bytes", "blocks", "chunk", "x", "x_stride",
            "x_scale", "x_scale_stride", "x_sum", "x_half", "x_half_stride", "init", "init_stride", "y", "y_stride",
            "x_low", "scale_low", "half_low")
(COUNTER, STEP, ROWS_AT, WEIGHTS, ROW_BLOCKS, ROW_BYTES, BLOCKS, CHUNK, X, X_STRIDE, X_SCALE, X_SCALE_STRIDE, X_SUM,
 X_HALF, X_HALF_STRIDE, INIT, INIT_STRIDE, Y, Y_STRIDE, X_LOW, SCALE_LOW, HALF_LOW) = range(len(OPERANDS))
PREFETCH_BYTES = 2048  # ahead of use, in each of two streams; measured best of 1024, 2048 and 4096 with one row
FEW_ROWS = 96  # for more of them, weights are waited for too rarely to be fetched ahead
LINE = memory.LINE


def operands(**values: int):
    """The operand block of a product: y[M, N] = init + x @ W.T.

    rows_at: index in the step block that holds M. init: float32 rows that sums start from (zeros or a bias with
    init_stride 0, or y itself to add to a residual). Strides in bytes. chunk: row blocks claimed at a time.
    x_low, scale_low, half_low: bytes from the codes, from the scales (and their sums) and from the sums of 16 of the
    first pass to those of the second.
    """
    return memory.operands(OPERANDS, **values)


class TileCodes:
    """The 8 steps of a tile as <64 x i8> unsigned codes, each unpacked where it is first asked for."""

    def __init__(self, e: Emit, form: TileFormat, tile: ir.Value):
        self.e, self.form, self.tile = e, form, tile
        self._loaded: dict[int, ir.Value] = {}

    def _load(self, offset: int) -> ir.Value:
        if offset not in self._loaded:
            self._loaded[offset] = self.e.load(self.tile, offset, bytes64)
        return self._loaded[offset]

    def step(self, j: int) -> ir.Value:
        b, words = self.e.b, vec(i16, 32)
        if self.form.bits == 8:
            return self._load(64 * j)
        code = self._load(64 * (j % 4))
        if j >= STEPS // 2:
            code = b.bitcast(b.lshr(b.bitcast(code, words), fill(4, i16, 32)), bytes64)
        code = b.and_(code, fill(15, i8, 64))
        extra = self.form.bits - 4
        if extra:
            per_plane = STEPS // extra
            plane, k = j // per_plane, j % per_plane
            bits = b.bitcast(self._load(256 + 64 * plane), words)
            shift = 4 - k * extra  # moves the step's bits to bit 4
            if shift > 0:
                bits = b.shl(bits, fill(shift, i16, 32))
            elif shift < 0:
                bits = b.lshr(bits, fill(-shift, i16, 32))
            code = b.or_(code, b.and_(b.bitcast(bits, bytes64), fill(16 if extra == 1 else 48, i8, 64)))
        return code


def load_scales(e: Emit, form: TileFormat, tile: ir.Value, d: ir.Value | None,
                dmin: ir.Value | None) -> tuple[list[ir.Value], ir.Value | None]:
    """Scales <16 x float> of a tile (two for "k16") and its minimum, to be added."""
    b, at = e.b, form.code_bytes
    if form.scales == "f16":
        scale = e.half_to_float(e.load(tile, at, vec(f16, LANES)))
        minimum = e.half_to_float(e.load(tile, at + 32, vec(f16, LANES))) if form.minimum else None
        return [scale], minimum
    codes = lambda offset, signed: (b.sitofp if signed else b.uitofp)(e.load(tile, at + offset, vec(i8, LANES)), wide)
    if form.scales == "k32":
        return [b.fmul(d, codes(0, False))], b.fmul(dmin, codes(16, False))
    return [b.fmul(d, codes(16 * half, True)) for half in range(2)], None


def make_micro(form: TileFormat, columns: int, row_blocks: int = 1, passes: int = 1, fetch: bool = True) -> Callable:
    """y[columns, 16 * row_blocks] = init + all tiles of the row blocks times `columns` activation rows.

    Two row blocks share the broadcast of an activation, and are two streams from memory: one row alone reads 16 %
    faster than with one.

    ahead: address of the row blocks that come next. With one or two columns, a question of bandwidth, each stream runs
    PREFETCH_BYTES ahead of its use, and on into those. With more, weights are used again from the caches, and a call
    fetches its share of the next ones, `pace` bytes from `ahead` on for each tile; fetch: if at all. (A loop over just
    the lines of that share would cut the code in two, which costs a quarter of the speed.)
    """
    grid = [(t, r) for t in range(columns) for r in range(row_blocks)]
    vectors = [(t, p) for t in range(columns) for p in range(passes)]

    @micro_kernel
    def tile_product(e, weights, row_bytes, blocks, x, x_stride, x_scale, x_scale_stride, x_sum, x_half,
                     x_half_stride, init, init_stride, y, y_stride, x_low, scale_low, half_low, ahead, pace):
        b = e.b
        column = lambda base, stride: [b.add(base, b.mul(stride, c64(t))) for t in range(columns)]
        every = lambda base, stride, low: {(t, p): b.add(b.add(base, b.mul(stride, c64(t))), b.mul(low, c64(p)))
                                           for t, p in vectors}
        xs, scales = every(x, x_stride, x_low), every(x_scale, x_scale_stride, scale_low)
        totals, halves = every(x_sum, x_scale_stride, scale_low), every(x_half, x_half_stride, half_low)
        starts = column(init, init_stride)
        row_weights = [b.add(weights, b.mul(row_bytes, c64(r))) for r in range(row_blocks)]
        zero_shift = fill(max(form.zero, 1).bit_length() - 1, i32, LANES)
        zero_counts = form.zero and (e.isa.dot != "sdot128" or form.bits < 8)
        none, bound = fill(0, i32, LANES), (1 << form.bits) - 1
        parts = 2 if form.scales == "k16" else 1

        def fetch_ahead(tiles, group):
            if columns > 2:
                target = b.add(ahead, b.mul(group, pace))
                for line in range(0, row_blocks * form.tile_bytes, LINE):
                    e.prefetch(target, line, locality=2)
                return
            for r, tile in enumerate(tiles):
                behind = b.add(b.sub(tile, row_weights[r]), c64(PREFETCH_BYTES))
                past = b.sub(behind, row_bytes)
                following = b.add(b.add(ahead, b.mul(row_bytes, c64(r))), past)
                target = b.select(b.icmp_signed("<", past, c64(0)), b.add(tile, c64(PREFETCH_BYTES)), following)
                for line in range(0, form.tile_bytes, LINE):
                    e.prefetch(target, line)

        def tile_sums(tiles, group, sums, d, dmin):
            """One tile of each row block; group is its index along the inputs."""
            g4, g32, g8 = b.mul(group, c64(4)), b.mul(group, c64(32)), b.mul(group, c64(8))
            if fetch:
                fetch_ahead(tiles, group)
            codes = [TileCodes(e, form, tile) for tile in tiles]
            total = {v: e.splat(e.load(totals[v], g4, i32, 4)) for v in vectors}
            accumulators = {}
            for v in vectors:
                for part in range(parts):
                    at = total[v] if parts == 1 else e.splat(e.load(halves[v], e.at(g8, 4 * part), i32, 4))
                    first = b.shl(at, zero_shift) if zero_counts else none
                    for r in range(row_blocks):
                        accumulators[v, r, part] = first
            two_chains = len(vectors) * row_blocks == 1 and parts == 1  # they hide the latency of the dot product
            second = dict.fromkeys(grid, none)
            order = [k for i in range(4) for k in (i, i + 4)] if form.bits < 8 else range(STEPS)
            for j in order:
                code = [c.step(j) for c in codes]
                part = j * parts // STEPS
                for v in vectors:
                    activation = e.splat(e.load(xs[v], e.at(g32, 4 * j), i32, 4))
                    for r in range(row_blocks):
                        if two_chains and j >= 4:
                            second[v[0], r] = e.dot(second[v[0], r], code[r], activation, bound)
                        else:
                            accumulators[v, r, part] = e.dot(accumulators[v, r, part], code[r], activation, bound)
            scale, minimum = zip(*(load_scales(e, form, tile, d[r], dmin[r]) for r, tile in enumerate(tiles)))
            result = []
            for t in range(columns):
                column_scale = [e.splat(e.load(scales[t, p], g4, f32, 4)) for p in range(passes)]
                # total is minus the sum of codes: what "k32" subtracts is added, what "f16" adds is negated
                weighted = [b.fmul(e.to_float(total[t, p]), column_scale[p]) for p in range(passes)]
                for r in range(row_blocks):
                    new = sums[grid.index((t, r))]
                    for p in range(passes):
                        for part in range(parts):
                            acc = accumulators[(t, p), r, part]
                            if two_chains:
                                acc = b.add(acc, second[t, r])
                            new = e.fma(e.to_float(acc), b.fmul(scale[r][part], column_scale[p]), new)
                        if form.minimum:
                            low = minimum[r] if form.scales == "k32" else e.negative(minimum[r])
                            new = e.fma(weighted[p], low, new)
                    result.append(new)
            return result

        with e.loop(blocks, [e.load(starts[t], 64 * r, wide) for t, r in grid]) as outer:
            at = b.mul(outer.index, c64(form.block_bytes))
            block = [b.add(w, at) for w in row_weights]
            absent = [None] * row_blocks
            if form.tiles_per_block == 1:
                outer.next = tile_sums(block, outer.index, outer.state, absent, absent)
            else:
                half = lambda offset: [e.half_to_float(e.load(p, offset, vec(f16, LANES))) for p in block]
                d, dmin = half(0), half(32) if form.scales == "k32" else absent
                first = b.mul(outer.index, c64(form.tiles_per_block))
                with e.loop(c64(form.tiles_per_block), outer.state) as inner:
                    inside = e.at(b.mul(inner.index, c64(form.tile_bytes)), form.header_bytes)
                    inner.next = tile_sums([b.add(p, inside) for p in block], b.add(first, inner.index), inner.state,
                                           d, dmin)
                outer.next = inner.result
        for (t, r), value in zip(grid, outer.result):
            e.store(b.add(y, b.mul(y_stride, c64(t))), 64 * r, value)

    return tile_product


def make_product(form: TileFormat, most: int, passes: int = 1) -> Callable:
    """The kernel: claims row blocks, and for each runs the micro-kernels over all activation rows."""
    four = max(2, most // 2 // passes)
    # Six columns hide the dot product's latency better where a tile has one scale: more of them spill registers.
    six = 6 if four == 4 and form.scales == "f16" else four
    pair_six, pair_four, pair_two, pair_one = (make_micro(form, columns, 2, passes) for columns in (six, four, 2, 1))
    pair_many = make_micro(form, four, 2, passes, fetch=False)
    single_four, single_one = (make_micro(form, columns, 1, passes) for columns in (four, 1))
    has_six, has_four = six > four, four > 2  # known when compiled: what is the same is not compiled twice
    pair_bytes, tiles_per_block = 2 * form.tile_bytes, form.tiles_per_block

    def product(op, thread, threads):
        rows = i64_at(i64_at(op, STEP), i64_at(op, ROWS_AT))
        counter, weights, row_blocks = i64_at(op, COUNTER), i64_at(op, WEIGHTS), i64_at(op, ROW_BLOCKS)
        row_bytes, blocks, chunk = i64_at(op, ROW_BYTES), i64_at(op, BLOCKS), i64_at(op, CHUNK)
        x, x_stride, x_scale, x_scale_stride = i64_at(op, X), i64_at(op, X_STRIDE), i64_at(op, X_SCALE), \
            i64_at(op, X_SCALE_STRIDE)
        x_sum, x_half, x_half_stride = i64_at(op, X_SUM), i64_at(op, X_HALF), i64_at(op, X_HALF_STRIDE)
        init, init_stride, y, y_stride = i64_at(op, INIT), i64_at(op, INIT_STRIDE), i64_at(op, Y), i64_at(op, Y_STRIDE)
        x_low, scale_low, half_low = i64_at(op, X_LOW), i64_at(op, SCALE_LOW), i64_at(op, HALF_LOW)
        if rows == 0:
            return
        # Calls with many columns share out among them what is fetched of the next row blocks.
        shares = max(rows // six + (1 if rows % six >= four else 0), 1)
        pace = (pair_bytes + shares - 1) // shares
        share_bytes = pace * blocks * tiles_per_block
        many = rows > FEW_ROWS
        first = fetch_add(counter, chunk)
        while first < row_blocks:
            following = fetch_add(counter, chunk)  # claimed ahead of time: its weights can be fetched ahead
            last = min(first + chunk, row_blocks)
            block = first
            while block < last:
                step = 2 if block + 1 < last else 1
                w, out, start = weights + block * row_bytes, y + block * 64, init + block * 64
                next_block = block + step if block + step < last else following
                ahead = weights + next_block * row_bytes if next_block < row_blocks else w
                m = 0
                while m < rows:
                    a, s, z, h = x + m * x_stride, x_scale + m * x_scale_stride, x_sum + m * x_scale_stride, \
                        x_half + m * x_half_stride
                    i, o = start + m * init_stride, out + m * y_stride
                    left = rows - m
                    part = ahead + m // six * share_bytes
                    if has_four and many and left >= four and step == 2:
                        pair_many(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                  init_stride, o, y_stride, x_low, scale_low, half_low, part, pace)
                        m += four
                    elif has_six and left >= six and step == 2:
                        pair_six(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                 init_stride, o, y_stride, x_low, scale_low, half_low, part, pace)
                        m += six
                    elif has_four and left >= four and step == 2:
                        pair_four(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                  init_stride, o, y_stride, x_low, scale_low, half_low, part, pace)
                        m += four
                    elif left >= four and step == 1:
                        single_four(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                    init_stride, o, y_stride, x_low, scale_low, half_low, part, pace)
                        m += four
                    elif left >= 2 and step == 2:
                        pair_two(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                 init_stride, o, y_stride, x_low, scale_low, half_low, ahead, pace)
                        m += 2
                    elif step == 2:
                        pair_one(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                 init_stride, o, y_stride, x_low, scale_low, half_low, ahead, pace)
                        m += 1
                    else:
                        single_one(w, row_bytes, blocks, a, x_stride, s, x_scale_stride, z, h, x_half_stride, i,
                                   init_stride, o, y_stride, x_low, scale_low, half_low, ahead, pace)
                        m += 1
                block += step
            first = following

    return product


def product_kernel(name: str, progress: Progress | None = None, passes: int = 1) -> int:
    """Address of the kernel for tiles of GGML type `name`; passes: int8 vectors of an activation."""
    most = current().columns
    return compile_kernel(f"matmul {name} x{most} passes{passes}", lambda: make_product(FORMATS[name], most, passes),
                          progress)


assert ROWS == LANES and step_state.ROWS == 0
