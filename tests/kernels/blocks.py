"""Random GGML blocks and the plain NumPy versions of what the kernels do with them."""
from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from edge_runtime.kernels.memory import aligned
from edge_runtime.quant.formats import FORMATS

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
          "Q6_K": (208,)}


def random_matrix(name: str, rows: int, inputs: int, rng: np.random.Generator) -> np.ndarray:
    """Raw bytes uint8 [rows, row_bytes] of a matrix of GGML type `name`, weights of a few tenths."""
    form = FORMATS[name]
    if name in ("F32", "F16"):
        x = (rng.standard_normal((rows, inputs)) * 0.1).astype(np.float32 if name == "F32" else np.float16)
        return np.ascontiguousarray(x).view(np.uint8).reshape(rows, -1)
    if name == "BF16":
        x = (rng.standard_normal((rows, inputs)) * 0.1).astype(np.float32).view(np.uint32) >> 16
        return np.ascontiguousarray(x.astype(np.uint16)).view(np.uint8).reshape(rows, -1)
    blocks = rng.integers(0, 256, (rows * inputs // form.block_size, form.block_bytes), dtype=np.uint8)
    top = 0.1 / form.levels / (32 if name.endswith("K") else 1)
    for at in HALVES[name]:
        d = (rng.uniform(-1, 1, len(blocks)) * top).astype(np.float16)
        blocks[:, at:at + 2] = d.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """float32 [M, K] -> int8 [M, K], scale float32 [M, K/32], minus the sums of 32 and of 16 codes, int32."""
    m, k = x.shape
    groups = x.reshape(m, k // 32, 32)
    scale = np.abs(groups).max(-1) / np.float32(127)
    inverse = np.where(scale > 0, np.float32(1) / np.where(scale > 0, scale, 1), 0).astype(np.float32)
    q = np.rint(groups * inverse[..., None]).astype(np.int8).reshape(m, k)
    sums = lambda n: -q.reshape(m, k // n, n).astype(np.int32).sum(-1, dtype=np.int32)
    return q, scale.astype(np.float32), sums(32), sums(16)


def function(address: int) -> Callable[[int, int, int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)(address)


def run(address: int, block: np.ndarray) -> None:
    """Runs a kernel alone: counter zeroed, one thread."""
    counter = aligned(8, np.int64)
    block = block.copy()
    block[0] = counter.ctypes.data
    function(address)(block.ctypes.data, 0, 1)
