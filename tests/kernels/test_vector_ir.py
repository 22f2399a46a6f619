"""What micro-kernels are written with: conversions, exp and the dot product, against NumPy, on any instruction set."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels import isa as isas
from edge_runtime.kernels.compile import compile_kernel
from edge_runtime.kernels.vector_ir import LANES, Emit, bytes64, f16, ints, micro_kernel, vec, wide
from tests.kernels.blocks import function

SETS = [s.name for s in isas.ALL if isas.runs_here(s)]


def apply(name, isa, body, source, target):
    """Runs `body(emit, source, target)` with addresses, as emitted for `isa`."""
    chosen = isas.named(isa)

    def make():
        kernel = micro_kernel(lambda e, s, t: body(Emit(e.b, chosen), s, t))
        return lambda a, b, n: kernel(a, b)

    function(compile_kernel(f"test {name} {isa}", make))(source.ctypes.data, target.ctypes.data, 0)


@pytest.mark.parametrize("isa", SETS)
def test_halves_to_floats_and_back_are_exact(isa):
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    back = lambda e, s, t: e.store(t, 0, e.half_to_float(e.load(s, 0, vec(f16, LANES))))
    there = lambda e, s, t: e.store(t, 0, e.float_to_half(e.load(s, 0, wide)))
    for start in (0, 16, 1008, 31728, 31744, 32768, 64512):
        source, got = every[start:start + 16].copy(), np.zeros(16, np.float32)
        apply("half to float", isa, back, source, got)
        assert np.array_equal(got, source.astype(np.float32), equal_nan=True)
    seed = 4
    print("seed", seed)
    rng = np.random.default_rng(seed)
    floats = np.concatenate([rng.standard_normal(64), rng.standard_normal(64) * 1e-6, rng.standard_normal(32) * 1e5,
                             [0.0, -0.0, np.inf, -np.inf, 65519.9, 65520.0, 2.0 ** -24, 2.0 ** -25, 2.0 ** -25 * 1.01,
                              1 + 2.0 ** -11, 1 + 3 * 2.0 ** -11, 6.1e-5, 5.96e-8, 1e-10, -70000, 0.1]])
    for source in floats.astype(np.float32).reshape(-1, 16):
        got = np.zeros(16, np.float16)
        apply("float to half", isa, there, source.copy(), got)
        with np.errstate(over="ignore"):
            assert np.array_equal(got.view(np.uint16), source.astype(np.float16).view(np.uint16)), source


@pytest.mark.parametrize("isa", SETS)
def test_exp(isa):
    x = np.linspace(-100, 20, 16 * 40).astype(np.float32).reshape(-1, 16)
    for source in x:
        got = np.zeros(16, np.float32)
        apply("exp", isa, lambda e, s, t: e.store(t, 0, e.exp(e.load(s, 0, wide))), source.copy(), got)
        want = np.exp(source.astype(np.float64))
        assert np.abs(got - want).max() <= 6e-7 * np.abs(want).max() or np.allclose(got, want, rtol=5e-6, atol=1e-37)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bound", [15, 63, 255])
def test_dot_is_exact(isa, bound):
    seed = 11
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for top in (bound, rng.integers(1, bound + 1)):
        both = np.zeros(128, np.uint8)
        both[:64] = rng.integers(0, top + 1, 64)
        both[64:] = rng.integers(-128, 128, 64).astype(np.int8).view(np.uint8)
        both[:8], both[64:72] = bound, 128  # the extremes together: -128 times the largest code
        got = rng.integers(-1000, 1000, 16).astype(np.int32)
        start = got.copy()
        apply(f"dot {bound}", isa, lambda e, s, t: e.store(t, 0, e.dot(
            e.load(t, 0, ints), e.load(s, 0, bytes64), e.load(s, 64, bytes64), bound)), both, got)
        products = both[:64].astype(np.int32) * both[64:].view(np.int8).astype(np.int32)
        assert np.array_equal(got, start + products.reshape(16, 4).sum(1))
