"""Packing GGML blocks into tiles and multiplying with them, against NumPy on the dequantized weights."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels import matmul_tiles, pack_tiles, step_state
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.tiles import FORMATS, matrix_bytes, row_blocks
from edge_runtime.quant.dequantize import dequantize
from tests.kernels.blocks import quantize_rows, random_matrix, run


def pack(name: str, raw: np.ndarray, rows: int, inputs: int) -> np.ndarray:
    packed = aligned(matrix_bytes(name, rows, inputs), np.uint8)
    packed[:] = 0xA5
    run(pack_tiles.pack_kernel(name), pack_tiles.operands(
        counter=0, source=raw.ctypes.data, source_row_bytes=raw.shape[1], rows=rows, inputs=inputs,
        target=packed.ctypes.data, block_row_bytes=len(packed) // row_blocks(rows)))
    return packed


def product(name: str, packed: np.ndarray, rows: int, x: np.ndarray, init: np.ndarray | None = None,
            passes: int = 1) -> np.ndarray:
    m, k = x.shape
    n = row_blocks(rows) * 16
    q, scale, sums, halves = quantize_rows(x)
    if passes == 2:
        left = x - (q.reshape(m, -1, 32) * scale[..., None]).reshape(m, k)
        both = [np.ascontiguousarray(np.stack(pair)) for pair in zip((q, scale, sums, halves), quantize_rows(left))]
        q, scale, sums, halves = both
    y = np.full((m, n), np.nan, np.float32)
    init = np.zeros(n, np.float32) if init is None else init
    step = np.zeros(len(step_state.NAMES), np.int64)
    step[step_state.ROWS] = m
    run(matmul_tiles.product_kernel(name, passes=passes), matmul_tiles.operands(
        counter=0, step=step.ctypes.data, rows_at=step_state.ROWS, weights=packed.ctypes.data,
        row_blocks=row_blocks(rows), row_bytes=len(packed) // row_blocks(rows), blocks=k // FORMATS[name].block_inputs,
        chunk=2, x=q.ctypes.data, x_stride=k, x_scale=scale.ctypes.data, x_scale_stride=k // 8, x_sum=sums.ctypes.data,
        x_half=halves.ctypes.data, x_half_stride=k // 4, init=init.ctypes.data,
        init_stride=0 if init.ndim == 1 else n * 4, y=y.ctypes.data, y_stride=n * 4,
        x_low=q.nbytes // 2, scale_low=scale.nbytes // 2, half_low=halves.nbytes // 2))
    return y


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("rows,inputs,m", [
    (16, 256, 1), (40, 512, 2), (100, 768, 15), (33, 256, 7), (64, 256, 16), (48, 512, 11), (130, 256, 4)])
def test_product_equals_numpy(name, rows, inputs, m):
    seed = rows + m
    print("seed", seed)
    rng = np.random.default_rng(seed)
    raw = random_matrix(name, rows, inputs, rng)
    x = rng.standard_normal((m, inputs)).astype(np.float32)
    bias = rng.standard_normal(row_blocks(rows) * 16).astype(np.float32)
    got = product(name, pack(name, raw, rows, inputs), rows, x, bias)
    q, scale, _, _ = quantize_rows(x)
    xd = (q.reshape(m, -1, 32).astype(np.float64) * scale[..., None]).reshape(m, inputs)
    want = xd @ dequantize(raw, name, (rows, inputs)).astype(np.float64).T + bias[:rows]
    assert np.abs(got[:, :rows] - want).max() <= 2e-5 * np.abs(want).max()
    assert np.array_equal(got[:, rows:], np.broadcast_to(bias[rows:], got[:, rows:].shape))


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("m", [1, 2, 7])
def test_two_passes_carry_the_activations_almost_exactly(name, m):
    seed = 60 + m
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rows, inputs = 40, 512
    raw = random_matrix(name, rows, inputs, rng)
    packed = pack(name, raw, rows, inputs)
    x = rng.standard_normal((m, inputs)).astype(np.float32)
    want = x.astype(np.float64) @ dequantize(raw, name, (rows, inputs)).astype(np.float64).T
    error = [np.abs(product(name, packed, rows, x, passes=p)[:, :rows] - want).max() for p in (1, 2)]
    assert error[1] < 2e-4 * np.abs(want).max() and error[1] < error[0] / 20


def test_a_row_does_not_depend_on_the_rows_beside_it():
    rng = np.random.default_rng(3)
    raw = random_matrix("Q4_K", 48, 512, rng)
    packed = pack("Q4_K", raw, 48, 512)
    x = rng.standard_normal((15, 512)).astype(np.float32)
    together = product("Q4_K", packed, 48, x)
    alone = np.concatenate([product("Q4_K", packed, 48, x[i:i + 1]) for i in range(15)])
    assert np.array_equal(together, alone)
