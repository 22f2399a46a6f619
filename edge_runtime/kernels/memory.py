"""Raw memory from Numba code: loads and stores at addresses, atomics for the thread team, operand blocks.

A kernel is `void(operands, thread, threads)`; its operands are an int64 array (addresses and counts) read with `i64`.
"""
from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_runtime.kernels.vector_ir import Emit, c64, f16, f32, i8, i16, i32, i64

LINE = 64  # bytes of a cache line: shared counters stand alone on theirs


def _intrinsic(returns: types.Type, body: Any) -> Any:
    """A Numba intrinsic that returns a value. Arguments: intp, or float32 where the caller passes a float."""

    def typing_and_code(typing, *arguments):
        signature = returns(*[types.float32 if isinstance(a, types.Float) else types.intp for a in arguments])

        def codegen(context, builder, sig, args):
            result = body(Emit(builder), *args)
            return context.get_dummy_value() if returns == types.void else result

        return signature, codegen

    names = list(inspect.signature(body).parameters)[1:]
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("typing", *names)]
    typing_and_code.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(typing_and_code)


def _scaled(e: Emit, address: ir.Value, index: ir.Value, size: int) -> ir.Value:
    return e.b.add(address, e.b.mul(index, c64(size)))


i64_at = _intrinsic(types.intp, lambda e, address, index: e.load(_scaled(e, address, index, 8), 0, i64, 8))
i32_at = _intrinsic(types.intp, lambda e, address, index: e.b.sext(e.load(_scaled(e, address, index, 4), 0, i32), i64))
u8_at = _intrinsic(types.intp, lambda e, address, index: e.b.zext(e.load(e.at(address, index), 0, i8), i64))
i8_at = _intrinsic(types.intp, lambda e, address, index: e.b.sext(e.load(e.at(address, index), 0, i8), i64))
f32_at = _intrinsic(types.float32, lambda e, address, index: e.load(_scaled(e, address, index, 4), 0, f32))
f16_at = _intrinsic(types.float32,
                    lambda e, address, index: e.half_to_float(e.load(_scaled(e, address, index, 2), 0, f16)))
bf16_at = _intrinsic(types.float32, lambda e, address, index: e.b.bitcast(
    e.b.shl(e.b.zext(e.load(_scaled(e, address, index, 2), 0, i16), i32), ir.Constant(i32, 16)), f32))
set_i64 = _intrinsic(types.void, lambda e, address, index, value: e.store(_scaled(e, address, index, 8), 0, value, 8))
set_i32 = _intrinsic(types.void, lambda e, address, index, value: e.store(
    _scaled(e, address, index, 4), 0, e.b.trunc(value, i32)))
set_i8 = _intrinsic(types.void, lambda e, address, index, value: e.store(
    e.at(address, index), 0, e.b.trunc(value, i8)))
set_f32 = _intrinsic(types.void, lambda e, address, index, value: e.store(
    _scaled(e, address, index, 4), 0, value))
set_f16 = _intrinsic(types.void, lambda e, address, index, value: e.store(
    _scaled(e, address, index, 2), 0, e.float_to_half(value)))


def _copy(e: Emit, target: ir.Value, source: ir.Value, count: ir.Value) -> None:
    e.call("llvm.memcpy.p0.p0.i64", ir.VoidType(),
           [e.pointer(target, i8), e.pointer(source, i8), count, ir.Constant(ir.IntType(1), 0)])


def _zero(e: Emit, target: ir.Value, count: ir.Value) -> None:
    e.call("llvm.memset.p0.i64", ir.VoidType(),
           [e.pointer(target, i8), ir.Constant(i8, 0), count, ir.Constant(ir.IntType(1), 0)])


copy_bytes = _intrinsic(types.void, _copy)
zero_bytes = _intrinsic(types.void, _zero)

# For threads: the counter a team claims work from, and the words it waits on.
fetch_add = _intrinsic(types.intp, lambda e, address, value: e.b.atomic_rmw(
    "add", e.pointer(address, i64), value, "seq_cst"))
load_acquire = _intrinsic(types.intp, lambda e, address: e.b.load_atomic(e.pointer(address, i64), "seq_cst", 8))
store_release = _intrinsic(types.void, lambda e, address, value: e.b.store_atomic(
    value, e.pointer(address, i64), "seq_cst", 8))


def _pause(e: Emit) -> None:
    if e.isa.machine == ("x86_64", "amd64"):
        e.call("llvm.x86.sse2.pause", ir.VoidType(), [])
    elif e.isa.machine == ("aarch64", "arm64"):
        e.call("llvm.aarch64.hint", ir.VoidType(), [ir.Constant(i32, 1)])


def _yield_processor(e: Emit) -> None:
    """Lets another thread have the core: a spinning thread must not keep the one it waits for from running."""
    if os.name == "posix":
        e.call("sched_yield", i32, [])


def _call(e: Emit, function: ir.Value, operands_: ir.Value, thread: ir.Value, threads: ir.Value) -> None:
    kernel = ir.FunctionType(ir.VoidType(), [i64, i64, i64])
    e.b.call(e.b.inttoptr(function, kernel.as_pointer()), [operands_, thread, threads])


call_kernel = _intrinsic(types.void, _call)
pause = _intrinsic(types.void, _pause)
yield_processor = _intrinsic(types.void, _yield_processor)


def operands(names: tuple[str, ...], **values: int) -> np.ndarray:
    """An operand block: int64 [len(names)], every name given once."""
    missing, unknown = set(names) - set(values), set(values) - set(names)
    if missing or unknown:
        raise TypeError(f"operands: missing {sorted(missing)}, unknown {sorted(unknown)}")
    return np.array([int(values[name]) for name in names], dtype=np.int64)


def aligned(count: int, dtype: Any, alignment: int = LINE) -> np.ndarray:
    """A zeroed array [count] whose address is a multiple of `alignment` bytes."""
    dtype = np.dtype(dtype)
    raw = np.zeros(count * dtype.itemsize + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start:start + count * dtype.itemsize].view(dtype)
