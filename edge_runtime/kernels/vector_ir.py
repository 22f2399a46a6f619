"""Vector IR in a few words: what every micro-kernel is written with.

A micro-kernel is a Numba @intrinsic whose body uses llvmlite's IR builder. Python loops unroll at code-generation
time, so register blocking is a parameter. Addresses are i64.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_runtime.kernels.isa import Isa, current

i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f16, f32 = ir.HalfType(), ir.FloatType()
LANES = 16  # rows of a tile, and lanes of every vector below


def vec(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def c64(value: int) -> ir.Constant:
    return ir.Constant(i64, value)


def fill(value: float, element: ir.Type, lanes: int) -> ir.Constant:
    return ir.Constant(vec(element, lanes), [value] * lanes)


wide = vec(f32, LANES)
ints = vec(i32, LANES)
bytes64 = vec(i8, 64)


class Emit:
    """Shorthand over an IRBuilder, for one instruction set."""

    def __init__(self, builder: ir.IRBuilder, isa: Isa | None = None):
        self.b = builder
        self.isa = isa or current()

    # memory
    def pointer(self, address: ir.Value, type_: ir.Type) -> ir.Value:
        return self.b.inttoptr(address, type_.as_pointer())

    def at(self, address: ir.Value, offset: int | ir.Value) -> ir.Value:
        if isinstance(offset, int):
            if offset == 0:
                return address
            offset = c64(offset)
        return self.b.add(address, offset)

    def load(self, address: ir.Value, offset: int | ir.Value, type_: ir.Type, align: int = 1) -> ir.Value:
        value = self.b.load(self.pointer(self.at(address, offset), type_))
        value.align = align
        return value

    def store(self, address: ir.Value, offset: int | ir.Value, value: ir.Value, align: int = 1) -> None:
        self.b.store(value, self.pointer(self.at(address, offset), value.type)).align = align

    def prefetch(self, address: ir.Value, offset: int | ir.Value = 0, locality: int = 3) -> None:
        arguments = [self.pointer(self.at(address, offset), i8), *(ir.Constant(i32, v) for v in (0, locality, 1))]
        self.call("llvm.prefetch.p0", ir.VoidType(), arguments)

    # shapes
    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        undefined = ir.Constant(vec(scalar.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(i32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(vec(i32, lanes), [0] * lanes))

    def shuffle(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        return self.b.shuffle_vector(a, b, ir.Constant(vec(i32, len(order)), list(order)))

    def part(self, vector: ir.Value, first: int, count: int) -> ir.Value:
        return self.shuffle(vector, vector, range(first, first + count))

    def join(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Vectors of equal length side by side."""
        parts = list(parts)
        while len(parts) > 1:
            n = parts[0].type.count
            parts = [self.shuffle(a, b, range(2 * n)) for a, b in zip(parts[::2], parts[1::2])]
        return parts[0]

    # arithmetic
    def call(self, name: str, return_type: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(return_type, [a.type for a in arguments]), name)
        return self.b.call(function, arguments)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.maxnum.{suffix}", a.type, [a, b])

    def negative(self, a: ir.Value) -> ir.Value:
        return self.b.fsub(fill(-0.0, f32, a.type.count), a)

    def absolute(self, a: ir.Value) -> ir.Value:
        return self.call(f"llvm.fabs.v{a.type.count}f32", a.type, [a])

    def reduce_max(self, a: ir.Value) -> ir.Value:
        return self.call(f"llvm.vector.reduce.fmax.v{a.type.count}f32", f32, [a])

    def reduce_add(self, a: ir.Value) -> ir.Value:
        """Sum of the lanes, pairwise: the order is the same on every processor."""
        while a.type.count > 1:
            half = a.type.count // 2
            a = self.b.fadd(self.part(a, 0, half), self.part(a, half, half))
        return self.b.extract_element(a, ir.Constant(i32, 0))

    def to_float(self, integers: ir.Value) -> ir.Value:
        return self.b.sitofp(integers, vec(f32, integers.type.count))

    def _like(self, value: ir.Value, element: ir.Type) -> Any:
        """The type of `value`, scalar or vector, with another element."""
        return vec(element, value.type.count) if isinstance(value.type, ir.VectorType) else element

    def half_to_float(self, halves: ir.Value) -> ir.Value:
        """float16 to float32, exact. Without the instruction: the exponent is moved by a product with 2^112."""
        b, kind, bits = self.b, self._like(halves, f32), self._like(halves, i32)
        if self.isa.dot != "portable":
            return b.fpext(halves, kind)
        number = lambda n: ir.Constant(bits, [n] * bits.count if isinstance(bits, ir.VectorType) else n)
        h = b.zext(b.bitcast(halves, self._like(halves, i16)), bits)
        power = b.bitcast(number((127 + 112) << 23), kind)
        magnitude = b.bitcast(b.fmul(b.bitcast(b.shl(b.and_(h, number(0x7FFF)), number(13)), kind), power), bits)
        special = b.icmp_unsigned(">=", b.and_(h, number(0x7FFF)), number(0x7C00))
        magnitude = b.select(special, b.or_(magnitude, number(0x7F800000)), magnitude)
        return b.bitcast(b.or_(magnitude, b.shl(b.and_(h, number(0x8000)), number(16))), kind)

    def float_to_half(self, floats: ir.Value) -> ir.Value:
        """float32 to float16, to nearest even, overflow to infinity."""
        b, kind, bits = self.b, self._like(floats, f16), self._like(floats, i32)
        if self.isa.dot != "portable":
            return b.fptrunc(floats, kind)
        number = lambda n: ir.Constant(bits, [n] * bits.count if isinstance(bits, ir.VectorType) else n)
        f = b.bitcast(floats, bits)
        sign, f = b.and_(f, number(-0x80000000)), b.and_(f, number(0x7FFFFFFF))
        infinite = b.select(b.icmp_unsigned(">", f, number(0x7F800000)), number(0x7E00), number(0x7C00))
        magic = number(((127 - 15) + (23 - 10) + 1) << 23)  # adding it rounds a subnormal half's last place
        summed = b.fadd(b.bitcast(f, floats.type), b.bitcast(magic, floats.type))
        subnormal = b.sub(b.bitcast(summed, bits), magic)
        odd = b.and_(b.lshr(f, number(13)), number(1))
        normal = b.lshr(b.add(b.add(f, number(((15 - 127) << 23) + 0xFFF)), odd), number(13))
        value = b.select(b.icmp_unsigned("<", f, number(113 << 23)), subnormal, normal)
        value = b.select(b.icmp_unsigned(">=", f, number((127 + 16) << 23)), infinite, value)
        return b.bitcast(b.trunc(b.or_(value, b.lshr(sign, number(16))), self._like(floats, i16)), kind)

    def round_to_int(self, floats: ir.Value) -> ir.Value:
        n = floats.type.count
        return self.b.fptosi(self.call(f"llvm.rint.v{n}f32", floats.type, [floats]), vec(i32, n))

    def exp(self, x: ir.Value) -> ir.Value:
        """exp for x <= 88: 2^n * 2^r, r in [-1/2, 1/2] by a polynomial, relative error 3e-7; 0 below -87."""
        b, const = self.b, lambda v: fill(v, f32, x.type.count)
        t = self.maximum(b.fmul(x, const(1.4426950408889634)), const(-126.0))
        n = self.call(f"llvm.rint.v{x.type.count}f32", x.type, [t])
        r, p = b.fsub(t, n), const(0.00015403530393381608)
        for c in (0.0013333558146428443, 0.009618129107628477, 0.05550410866482158, 0.2402265069591007,
                  0.6931471805599453, 1.0):
            p = self.fma(p, r, const(c))
        power = b.shl(b.add(b.fptosi(n, vec(i32, x.type.count)), fill(127, i32, x.type.count)),
                      fill(23, i32, x.type.count))
        result = b.fmul(p, b.bitcast(power, x.type))
        return b.select(b.fcmp_ordered("<", x, const(-87.0)), const(0.0), result)

    def dot(self, acc: ir.Value, unsigned: ir.Value, signed: ir.Value, bound: int = 255) -> ir.Value:
        """acc[lane] += sum of 4 products u8 * s8, exact. acc <16 x i32>; unsigned, signed <64 x i8> (or <16 x i32>).

        bound: largest unsigned value; small ones allow cheaper code. On `sdot128` the unsigned operand is read as
        signed, so with `weight_bias` 0 the caller packs signed codes (see `tiles.weight_bias`).
        """
        as_bytes = lambda v: v if v.type == bytes64 else self.b.bitcast(v, bytes64)
        return _DOTS[self.isa.dot](self, acc, as_bytes(unsigned), as_bytes(signed), bound)

    # control
    @contextmanager
    def loop(self, count: ir.Value, state: Sequence[ir.Value] = (), step: int = 1):
        """`with e.loop(n, [a, b]) as l:` body reads l.index, l.state, sets l.next; l.result holds the final state."""
        b = self.b
        entry, body, done = b.block, b.append_basic_block("body"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed(">", count, c64(0)), body, done)
        b.position_at_end(body)
        loop = Loop()
        loop.index = b.phi(i64)
        loop.index.add_incoming(c64(0), entry)
        loop.state = [b.phi(s.type) for s in state]
        for phi, start in zip(loop.state, state):
            phi.add_incoming(start, entry)
        loop.next = list(loop.state)
        yield loop
        following, last = b.add(loop.index, c64(step)), b.block
        loop.index.add_incoming(following, last)
        for phi, value in zip(loop.state, loop.next):
            phi.add_incoming(value, last)
        b.cbranch(b.icmp_signed("<", following, count), body, done)
        b.position_at_end(done)
        loop.result = []
        for start, value in zip(state, loop.next):
            phi = b.phi(start.type)
            phi.add_incoming(start, entry)
            phi.add_incoming(value, last)
            loop.result.append(phi)


class Loop:
    index: Any
    state: list
    next: list
    result: list


def _vnni512(e: Emit, acc, unsigned, signed, bound):
    return e.call("llvm.x86.avx512.vpdpbusd.512", ints, [acc, unsigned, signed])


def _by_parts(e: Emit, acc, unsigned, signed, lanes, one):
    """Runs `one` on registers of `lanes` sums each."""
    pieces = []
    for first in range(0, LANES, lanes):
        pieces.append(one(e.part(acc, first, lanes), e.part(unsigned, 4 * first, 4 * lanes),
                          e.part(signed, 4 * first, 4 * lanes)))
    return e.join(pieces)


def _vnni256(e: Emit, acc, unsigned, signed, bound):
    return _by_parts(e, acc, unsigned, signed, 8, lambda a, u, s: e.call(
        "llvm.x86.avx512.vpdpbusd.256", vec(i32, 8), [a, u, s]))


def _maddubs256(e: Emit, acc, unsigned, signed, bound):
    """vpmaddubsw sums two products in 16 bits, saturating: exact while 2 * bound * 128 stays below 32,768."""
    b, pairs = e.b, vec(i16, 16)

    def madd(x, y):
        return e.call("llvm.x86.avx2.pmadd.wd", vec(i32, 8), [x, y])

    def one(a, u, s):
        if 2 * bound * 128 < 32768:
            products = e.call("llvm.x86.avx2.pmadd.ub.sw", pairs, [u, s])
            return b.add(a, madd(products, fill(1, i16, 16)))
        u, s, eight = b.bitcast(u, pairs), b.bitcast(s, pairs), fill(8, i16, 16)
        even = madd(b.and_(u, fill(255, i16, 16)), b.ashr(b.shl(s, eight), eight))
        odd = madd(b.lshr(u, eight), b.ashr(s, eight))
        return b.add(a, b.add(even, odd))

    return _by_parts(e, acc, unsigned, signed, 8, one)


def _sdot128(e: Emit, acc, unsigned, signed, bound):
    return _by_parts(e, acc, unsigned, signed, 4, lambda a, u, s: e.call(
        "llvm.aarch64.neon.sdot.v4i32.v16i8", vec(i32, 4), [a, u, s]))


def _portable(e: Emit, acc, unsigned, signed, bound):
    b = e.b
    u, s = b.bitcast(unsigned, ints), b.bitcast(signed, ints)
    for byte in range(4):
        left, right = fill(24 - 8 * byte, i32, LANES), fill(24, i32, LANES)
        acc = b.add(acc, b.mul(b.lshr(b.shl(u, left), right), b.ashr(b.shl(s, left), right)))
    return acc


_DOTS: dict[str, Callable] = {"vnni512": _vnni512, "vnni256": _vnni256, "maddubs256": _maddubs256,
                              "sdot128": _sdot128, "portable": _portable}


def micro_kernel(body: Callable) -> Any:
    """A Numba intrinsic from `body(emit, *arguments)`: every argument an intp (address or count), no result."""

    def typing_and_code(typing, *arguments):
        signature = types.void(*[types.intp] * len(arguments))

        def codegen(context, builder, sig, args):
            body(Emit(builder), *args)
            return context.get_dummy_value()

        return signature, codegen

    names = list(inspect.signature(body).parameters)[1:]
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("typing", *names)]
    typing_and_code.__name__ = body.__name__
    typing_and_code.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    kernel: Any = intrinsic(typing_and_code)
    kernel.body, kernel.arity = body, len(names)  # for reading the code of processors that this one is not
    return kernel
