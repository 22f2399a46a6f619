"""GGML blocks in the layout of ONNX Runtime's MatMulNBits: the same weights, code for code.

    weight[row, k] = scales[row, k // block] * (code[row, k] - 2**(bits - 1)) + offsets[row, k // block]

| GGML type | bits | block | offsets | error |
|---|---|---|---|---|
| Q4_0 | 4 | 32 | no | none: the file's own codes |
| Q4_1, Q4_K | 4 | 32 | yes | the file's own codes; offsets rounded to float32, below 1e-6 of a block's largest weight |
| Q8_0, Q5_0 | 8 | 32 | no | none |
| Q5_1, Q5_K | 8 | 32 | yes | as Q4_1 |
| Q6_K | 8 | 16 | no | none |
| F16, BF16, F32 | 32 | - | no | none: a float32 matrix |

Offsets are what a format with minima has beyond a scale. A zero point in whole codes cannot hold them, so the graph
adds `block sums of the input @ offsets.T`, at one float32 a block.
Specification of the operator: ONNX Runtime's ContribOperators.md, com.microsoft.MatMulNBits.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.models.gguf_file import GGUFFile, TensorInfo
from edge_runtime.quant.dequantize import dequantize, k_scales
from edge_runtime.quant.formats import FORMATS

CHUNK_WEIGHTS = 1 << 22  # converted at once: temporaries stay below 100 MB


@dataclass(frozen=True)
class Layout:
    """How a type's rows lie in MatMulNBits. bits 32: not quantized."""

    bits: int
    block: int
    offsets: bool = False

    @property
    def code_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block * self.bits // 8


LAYOUTS = {
    "Q4_0": Layout(4, 32), "Q4_1": Layout(4, 32, True), "Q4_K": Layout(4, 32, True),
    "Q8_0": Layout(8, 32), "Q5_0": Layout(8, 32), "Q5_1": Layout(8, 32, True), "Q5_K": Layout(8, 32, True),
    "Q6_K": Layout(8, 16), "F16": Layout(32, 1), "BF16": Layout(32, 1), "F32": Layout(32, 1),
}


@dataclass(frozen=True)
class Matrix:
    """Matrices of one layout and input width, stacked: rows[i] rows of tensor names[i]."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    layout: Layout

    @property
    def outputs(self) -> int:
        return sum(self.rows)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.inputs // self.layout.block

    def parts(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and types of the arrays that `fill` wants.

        codes: uint8 [rows, blocks, bytes]; scales: float32 [rows, blocks]; offsets: float32 [blocks, rows]; weights of
        a float matrix: float32 [inputs, rows].
        """
        f32: np.dtype = np.dtype(np.float32)
        n, blocks = self.outputs, self.blocks
        if self.layout.bits == 32:
            return {"weights": ((self.inputs, n), f32)}
        parts: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "codes": ((n, blocks, self.layout.code_bytes), np.dtype(np.uint8)), "scales": ((n, blocks), f32)}
        if self.layout.offsets:
            parts["offsets"] = ((blocks, n), f32)
        return parts

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.parts().values())

    def fill(self, file: GGUFFile, arrays: dict[str, np.ndarray]) -> None:
        """Converts the file's blocks into `arrays`, which `parts` describes."""
        first = 0
        for name, rows in zip(self.names, self.rows):
            info, data = file.tensors[name], file.data(name).reshape(rows, -1)
            step = max(1, CHUNK_WEIGHTS // self.inputs)
            for at in range(0, rows, step):
                chunk = data[at:at + step]
                part = slice(first + at, first + at + len(chunk))
                if self.layout.bits == 32:
                    arrays["weights"][:, part] = dequantize(chunk, info.type, (len(chunk), self.inputs)).T
                    continue
                codes, scales, offsets = convert(chunk, info.type, self.inputs)
                arrays["codes"][part], arrays["scales"][part] = codes, scales
                if offsets is not None:
                    arrays["offsets"][:, part] = offsets.T
            first += rows
            file.release(name)


def stack(infos: list[TensorInfo]) -> list[Matrix]:
    """Neighbouring tensors of one layout become one matrix: fewer, larger products."""
    matrices: list[Matrix] = []
    for info in infos:
        rows, inputs = info.shape
        layout = LAYOUTS[info.type]
        if matrices and matrices[-1].layout == layout and matrices[-1].inputs == inputs:
            last = matrices.pop()
            matrices.append(Matrix((*last.names, info.name), (*last.rows, rows), inputs, layout))
        else:
            matrices.append(Matrix((info.name,), (rows,), inputs, layout))
    return matrices


def convert(data: np.ndarray, type: str, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """data: uint8 [rows, bytes of a row]. Codes [rows, blocks, bytes], scales [rows, blocks], offsets or None."""
    layout, rows = LAYOUTS[type], len(data)
    blocks = data.reshape(-1, FORMATS[type].block_bytes)
    codes, scales, offsets = _READERS[type](blocks)
    codes = codes.reshape(rows, inputs // layout.block, layout.block)
    if layout.bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = scales.reshape(rows, -1).astype(np.float32)
    return codes, scales, None if offsets is None else offsets.reshape(rows, -1).astype(np.float32)


def restore(matrix: Matrix, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [outputs, inputs] of what the graph computes with: the definition, and the oracle of the tests."""
    if matrix.layout.bits == 32:
        return np.ascontiguousarray(arrays["weights"].T)
    codes = arrays["codes"]
    if matrix.layout.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    codes = codes.reshape(matrix.outputs, matrix.blocks, matrix.layout.block).astype(np.float32)
    weights = arrays["scales"][..., None] * (codes - 2 ** (matrix.layout.bits - 1))
    if "offsets" in arrays:
        weights = weights + arrays["offsets"].T[..., None]
    return weights.reshape(matrix.outputs, matrix.inputs)


Read = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at:at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _five(blocks: np.ndarray, at: int) -> np.ndarray:
    high = np.unpackbits(blocks[:, at:at + 4], axis=1, bitorder="little") << 4
    return (_nibbles(blocks[:, at + 4:]) | high) + np.uint8(128 - 16)


def _q4_0(blocks: np.ndarray) -> Read:
    return _nibbles(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Read:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 4:]), scale, scale * 8 + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Read:
    return _five(blocks, 2), _half(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Read:
    scale = _half(blocks, 0)
    return _five(blocks, 4), scale, scale * 16 + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Read:
    return blocks[:, 2:] + np.uint8(128), _half(blocks, 0), None  # int8 codes, modulo 256


def _k(blocks: np.ndarray, codes: np.ndarray, centre: int) -> Read:
    scales, minima = k_scales(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales
    return codes, scale, scale * centre - _half(blocks, 2) * minima


def _q4_k(blocks: np.ndarray) -> Read:
    return _k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)), 8)


def _q5_k(blocks: np.ndarray) -> Read:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (blocks[:, 16:48][:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _k(blocks, (low | high << 4) + np.uint8(128 - 16), 16)


def _q6_k(blocks: np.ndarray) -> Read:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scale = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return (low | high << 4) + np.uint8(128 - 32), scale, None


_READERS: dict[str, Callable[[np.ndarray], Read]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
