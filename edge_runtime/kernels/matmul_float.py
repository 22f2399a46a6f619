"""Matrix products with float weights (F32, F16, BF16) and float32 activations: y = init + x @ W.T, exact formats."""
from __future__ import annotations

from collections.abc import Callable

from edge_runtime.kernels import memory
from edge_runtime.kernels.compile import Progress, compile_kernel
from edge_runtime.kernels.memory import fetch_add, i64_at
from edge_runtime.kernels.tiles import FLOAT_FORMATS
from edge_runtime.kernels.vector_ir import LANES, c64, f16, f32, fill, i16, i32, micro_kernel, vec, wide

OPERANDS = ("counter", "step", "rows_at", "weights", "row_blocks", "inputs", "chunk", "x", "x_stride", "init",
            "init_stride", "y", "y_stride")
(COUNTER, STEP, ROWS_AT, WEIGHTS, ROW_BLOCKS, INPUTS, CHUNK, X, X_STRIDE, INIT, INIT_STRIDE, Y, Y_STRIDE) = range(
    len(OPERANDS))


def operands(**values: int):
    """As `matmul_tiles.operands`; weights [N / 16, inputs, 16]; x float32."""
    return memory.operands(OPERANDS, **values)


def make_micro(name: str, columns: int) -> Callable:
    size = FLOAT_FORMATS[name]

    @micro_kernel
    def float_product(e, weights, inputs, x, x_stride, init, init_stride, y, y_stride):
        b = e.b
        column = lambda base, stride: [b.add(base, b.mul(stride, c64(t))) for t in range(columns)]
        xs = column(x, x_stride)
        start = [e.load(at, 0, wide) for at in column(init, init_stride)]
        with e.loop(inputs, start) as l:
            at = b.add(weights, b.mul(l.index, c64(16 * size)))
            if name == "F32":
                w = e.load(at, 0, wide)
            elif name == "F16":
                w = e.half_to_float(e.load(at, 0, vec(f16, LANES)))
            else:
                bits = b.zext(e.load(at, 0, vec(i16, LANES)), vec(i32, LANES))
                w = b.bitcast(b.shl(bits, fill(16, i32, LANES)), wide)
            k4 = b.mul(l.index, c64(4))
            l.next = [e.fma(w, e.splat(e.load(xs[t], k4, f32, 4)), l.state[t]) for t in range(columns)]
        for t, at in enumerate(column(y, y_stride)):
            e.store(at, 0, l.result[t])

    return float_product


def make_product(name: str) -> Callable:
    four, one = make_micro(name, 4), make_micro(name, 1)
    size = FLOAT_FORMATS[name]

    def product(op, thread, threads):
        rows = i64_at(i64_at(op, STEP), i64_at(op, ROWS_AT))
        counter, weights, row_blocks = i64_at(op, COUNTER), i64_at(op, WEIGHTS), i64_at(op, ROW_BLOCKS)
        inputs, chunk, x, x_stride = i64_at(op, INPUTS), i64_at(op, CHUNK), i64_at(op, X), i64_at(op, X_STRIDE)
        init, init_stride, y, y_stride = i64_at(op, INIT), i64_at(op, INIT_STRIDE), i64_at(op, Y), i64_at(op, Y_STRIDE)
        if rows == 0:
            return
        while True:
            first = fetch_add(counter, chunk)
            if first >= row_blocks:
                break
            for block in range(first, min(first + chunk, row_blocks)):
                w, out, start = weights + block * inputs * 16 * size, y + block * 64, init + block * 64
                m = 0
                while m < rows:
                    if rows - m >= 4:
                        four(w, inputs, x + m * x_stride, x_stride, start + m * init_stride, init_stride,
                             out + m * y_stride, y_stride)
                        m += 4
                    else:
                        one(w, inputs, x + m * x_stride, x_stride, start + m * init_stride, init_stride,
                            out + m * y_stride, y_stride)
                        m += 1

    return product


def product_kernel(name: str, progress: Progress | None = None) -> int:
    """Address of the kernel for float type `name`."""
    return compile_kernel(f"matmul {name}", lambda: make_product(name), progress)
