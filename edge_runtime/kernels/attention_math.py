"""Vectors of 16 floats for attention: maxima, exponentials, logarithms, rows whose size no 16 divides."""
from __future__ import annotations

import math

from llvmlite import ir

from edge_runtime.kernels.vector_ir import LANES, Emit, f32, fill, i32, vec, wide

EXP2 = {3: (0.05500893294811249, 0.2422109693288803, 0.6932829022407532),
        4: (0.009582852013409138, 0.055906426161527634, 0.24024099111557007, 0.6931241750717163),
        5: (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253,
            0.6931470036506653)}  # relative errors 1e-4, 3e-6, 1e-7


def vmax(e: Emit, a: ir.Value, b: ir.Value) -> ir.Value:
    """One max instruction: `b` where either is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", a, b), a, b)


def exp2(e: Emit, x: ir.Value, degree: int = 5) -> ir.Value:
    """2^x for x <= 127; 2^-100 below -100: nothing beside 1, and its products with scales are no denormals, which cost
    hundreds of cycles each. NaN stays NaN. Adding 1.5 * 2^23 leaves round(x) in the low bits."""
    b, n = e.b, x.type.count
    magic = fill(12582912.0, f32, n)
    x = vmax(e, fill(-100.0, f32, n), x)
    shifted = b.fadd(x, magic)
    r = b.fsub(x, b.fsub(shifted, magic))
    first, *others = (*EXP2[degree], 1.0)
    p = fill(first, f32, n)
    for c in others:
        p = e.fma(p, r, fill(c, f32, n))
    bits = vec(i32, n)
    power = b.shl(b.bitcast(shifted, bits), fill(23, i32, n))
    return b.bitcast(b.add(b.bitcast(p, bits), power), x.type)


def nan_of(e: Emit, parts: list) -> ir.Value:
    """0, or NaN where one of the vectors' values is NaN or infinite: added to scales, so that it is not lost."""
    zero = fill(0.0, f32, LANES)
    total = e.b.fmul(parts[0], zero)
    for part in parts[1:]:
        total = e.fma(part, zero, total)
    return e.reduce_add(total)


def horizontal_max(e: Emit, a: ir.Value) -> ir.Value:
    while a.type.count > 1:
        half = a.type.count // 2
        a = vmax(e, e.part(a, 0, half), e.part(a, half, half))
    return e.b.extract_element(a, ir.Constant(i32, 0))


def row_maxima(e: Emit, rows: list) -> ir.Value:
    """The maximum of vector r of `rows` (at most 16) in lane r; other lanes repeat these. All are reduced at once:
    vectors are paired, half of the lanes of each, until one vector is left."""
    rows = list(rows)
    rows += rows[-1:] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
    period = 1  # lane i belongs to the vector's row i % period
    while len(rows) > 1:
        lanes = [i % (2 * period) // period * LANES + i // (2 * period) * 2 * period + i % period for i in range(LANES)]
        others = [lane + period for lane in lanes]
        rows = [vmax(e, e.shuffle(a, b, lanes), e.shuffle(a, b, others)) for a, b in zip(rows[::2], rows[1::2])]
        period *= 2
    top = rows[0]
    while top.type.count > period:
        half = top.type.count // 2
        top = vmax(e, e.part(top, 0, half), e.part(top, half, half))
    return e.shuffle(top, top, [i % period for i in range(LANES)])


def broadcast(e: Emit, address: ir.Value, offset, element=f32) -> ir.Value:
    return e.splat(e.load(address, offset, element, 4), LANES)


def load_padded(e: Emit, address: ir.Value, first: int, size: int) -> ir.Value:
    """16 floats from index `first`, zeros from `size` on."""
    n = min(LANES, size - first)
    if n == LANES:
        return e.load(address, 4 * first, wide, 4)
    part = e.load(address, 4 * first, vec(f32, n), 4)
    return e.b.shuffle_vector(part, ir.Constant(vec(f32, n), [0.0] * n),
                              ir.Constant(vec(i32, LANES), [min(i, n) for i in range(LANES)]))


def log2(e: Emit, x: ir.Value) -> ir.Value:
    """log2 of a positive scalar: exponent, and the series of 2 atanh(z) for the mantissa in [0.7, 1.42], to 1e-7."""
    b, const = e.b, lambda v: fill(v, f32, 4)
    x = e.splat(x, 4)
    bits = b.sub(b.bitcast(x, vec(i32, 4)), fill(0x3F3504F3, i32, 4))
    exponent = b.ashr(bits, fill(23, i32, 4))
    mantissa = b.bitcast(b.sub(b.bitcast(x, vec(i32, 4)), b.shl(exponent, fill(23, i32, 4))), vec(f32, 4))
    z = b.fdiv(b.fsub(mantissa, const(1.0)), b.fadd(mantissa, const(1.0)))
    square, p = b.fmul(z, z), const(1 / 9)
    for c in (1 / 7, 1 / 5, 1 / 3, 1.0):
        p = e.fma(p, square, const(c))
    result = e.fma(b.fmul(z, const(2 / math.log(2))), p, e.to_float(exponent))
    return b.extract_element(result, ir.Constant(i32, 0))


def store_part(e: Emit, out, first: int, size: int, value) -> None:
    """16 floats at index `first`, as far as `size` goes."""
    n = min(LANES, size - first)
    e.store(out, 4 * first, value if n == LANES else e.part(value, 0, n), 4)
