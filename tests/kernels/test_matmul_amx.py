"""Products on bf16 matrix tiles against NumPy, where the processor has them."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels import matmul_amx, step_state
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.tiles import FORMATS, row_blocks
from edge_runtime.quant.dequantize import dequantize
from tests.kernels.blocks import random_matrix, run
from tests.kernels.test_matmul_tiles import pack

pytestmark = pytest.mark.skipif(not current().matrix_tiles, reason="no matrix tiles, or another set is forced")


def bf16_tiles(x: np.ndarray) -> np.ndarray:
    """float32 [M, K] -> uint16 [M / 16, K / 32, 16, 32], rounded to nearest even, rows padded with zeros."""
    m, k = x.shape
    padded = np.zeros((-(-m // 16) * 16, k), np.float32)
    padded[:m] = x
    bits = padded.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(rounded.reshape(-1, 16, k // 32, 32).transpose(0, 2, 1, 3))


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("rows,inputs,m", [(16, 256, 1), (40, 512, 33), (300, 1280, 50)])
def test_product_equals_numpy(name, rows, inputs, m):
    seed = rows + m
    print("seed", seed)
    rng = np.random.default_rng(seed)
    raw = random_matrix(name, rows, inputs, rng)
    packed = pack(name, raw, rows, inputs)
    x = rng.standard_normal((m, inputs)).astype(np.float32)
    tiles = bf16_tiles(x)
    n, padded = row_blocks(rows) * 16, -(-m // 16) * 16
    y = rng.standard_normal((padded, n)).astype(np.float32)
    init = y.copy()
    scratch = aligned(matmul_amx.scratch_bytes(m), np.uint8)
    step = np.zeros(len(step_state.NAMES), np.int64)
    step[step_state.ROWS] = m
    config = matmul_amx.tile_config()
    run(matmul_amx.product_kernel(name), matmul_amx.operands(
        counter=0, step=step.ctypes.data, rows_at=step_state.ROWS, first_at=step_state.ZERO,
        weights=packed.ctypes.data,
        row_blocks=row_blocks(rows), row_bytes=len(packed) // row_blocks(rows), inputs=inputs, x=tiles.ctypes.data,
        init=y.ctypes.data, init_stride=n * 4, y=y.ctypes.data, y_stride=n * 4, scratch=scratch.ctypes.data,
        scratch_stride=len(scratch), config=config.ctypes.data))
    want = x.astype(np.float64) @ dequantize(raw, name, (rows, inputs)).astype(np.float64).T
    difference = y[:m, :rows] - init[:m, :rows] - want
    assert np.sqrt((difference ** 2).mean()) <= 6e-3 * np.sqrt((want ** 2).mean())
    gain = (difference * want).sum() / (want ** 2).sum()  # truncation must not shrink the weights
    assert want.size < 1000 or abs(gain) <= 1e-3
