"""One product of float32 rows with a 4-bit matrix, blocks of 32: our kernels and OpenVINO's MatMulNBits."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.kernels import matmul_amx, matmul_tiles, pack_tiles, rows, step_state
from edge_runtime.kernels.isa import current
from edge_runtime.kernels.memory import aligned
from edge_runtime.kernels.team import Operation, Program, Team
from edge_runtime.kernels.tiles import FORMATS, matrix_bytes, row_blocks
from edge_runtime.quant.quantize import quantize

BLOCK = 32
# The fastest counts: rows quantized in groups (the default), not at all, and in the precision of the input.
OPENVINO_OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}, {"INFERENCE_PRECISION_HINT": "f32"},
    {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32, "INFERENCE_PRECISION_HINT": "f32"})


@dataclass(frozen=True)
class Data:
    """x float32 [M, K]; weights: Q4_0 blocks of a matrix [N, K]."""

    x: np.ndarray
    weights: np.ndarray
    outputs: int

    @classmethod
    def random(cls, rows_: int, inputs: int, outputs: int, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        weights = quantize(rng.standard_normal((outputs, inputs), np.float32) * inputs ** -0.5, "Q4_0")
        return cls(rng.standard_normal((rows_, inputs), np.float32), weights, outputs)

    @property
    def operations(self) -> int:
        return 2 * self.x.shape[0] * self.x.shape[1] * self.outputs


def our_product(data: Data, team: Team) -> Callable[[], np.ndarray]:
    """A function that computes x @ W.T, from float32 rows to float32 rows, as a prompt is computed."""
    (m, k), n = data.x.shape, data.outputs
    tiles = current().matrix_tiles
    packed = aligned(matrix_bytes("Q4_0", n, k), np.uint8, 4096)
    blocks = row_blocks(n)
    row_bytes = len(packed) // blocks
    raw = np.ascontiguousarray(data.weights.reshape(n, -1))
    team.run(Program([Operation("pack", pack_tiles.pack_kernel("Q4_0"), pack_tiles.operands(
        counter=0, source=raw.ctypes.data, source_row_bytes=raw.shape[1], rows=n, inputs=k, target=packed.ctypes.data,
        block_row_bytes=row_bytes))]))
    x, y = aligned(m * k, np.float32), aligned(-(-m // 16) * 16 * n, np.float32)
    x[:] = data.x.ravel()
    many = -(-m // 16) * 16
    int8, bf16 = aligned(many * k, np.int8), aligned(many * k, np.uint16)
    scale, sums, halves = (aligned(many * k // 32, np.float32), aligned(many * k // 32, np.int32),
                           aligned(many * k // 16, np.int32))
    state, eps, zeros = aligned(len(step_state.NAMES), np.int64), aligned(16, np.float32), aligned(n, np.float32)
    state[step_state.ROWS] = m
    state[step_state.FEW_ROWS], state[step_state.MANY_ROWS] = (0, m) if tiles else (m, 0)
    scratch = aligned(team.threads * (k * 4 + 64), np.uint8)
    form = rows.BF16_TILE if tiles else rows.INT8
    convert = Operation("rows", rows.rows_kernel(), rows.operands(
        counter=0, step=state.ctypes.data, rows_at=step_state.ROWS, index_at=step_state.ZERO, kind=rows.COPY,
        a=x.ctypes.data, a_stride=k * 4, b=0, b_stride=0, width=k, true_width=k, eps=eps.ctypes.data,
        forms=form | rows.INT8, q=int8.ctypes.data, q_stride=k, q_scale=scale.ctypes.data, q_scale_stride=k // 8,
        q_sum=sums.ctypes.data, q_half=halves.ctypes.data, q_half_stride=k // 4, bf16=bf16.ctypes.data,
        bf16_tiles=k // 32, out=0, out_stride=0, scratch=scratch.ctypes.data, scratch_stride=k * 4 + 64, q_low=0,
        scale_low=0, half_low=0))
    kept = [packed, raw, x, int8, bf16, scale, sums, halves, state, eps, zeros, scratch]
    shared = dict(counter=0, step=state.ctypes.data, weights=packed.ctypes.data, row_blocks=blocks,
                  row_bytes=row_bytes, init=zeros.ctypes.data, init_stride=0, y=y.ctypes.data, y_stride=n * 4)
    if tiles:
        stride = -(-matmul_amx.scratch_bytes(many) // 4096) * 4096
        own, config = aligned(team.threads * stride, np.uint8, 4096), matmul_amx.tile_config()
        kept += [own, config]
        product = Operation("product", matmul_amx.product_kernel("Q4_0"), matmul_amx.operands(
            rows_at=step_state.MANY_ROWS, first_at=step_state.FEW_ROWS, inputs=k, x=bf16.ctypes.data,
            scratch=own.ctypes.data, scratch_stride=stride, config=config.ctypes.data, **shared))
    else:
        product = Operation("product", matmul_tiles.product_kernel("Q4_0"), matmul_tiles.operands(
            rows_at=step_state.ROWS, blocks=k // FORMATS["Q4_0"].block_inputs, chunk=2, x=int8.ctypes.data, x_stride=k,
            x_scale=scale.ctypes.data, x_scale_stride=k // 8, x_sum=sums.ctypes.data, x_half=halves.ctypes.data,
            x_half_stride=k // 4, x_low=0, scale_low=0, half_low=0, **shared))
    program = Program([convert, product])

    def run() -> np.ndarray:
        assert kept
        team.run(program)
        return y.reshape(-1, n)[:m]

    return run


def openvino_product(data: Data, threads: int) -> Callable[[], np.ndarray]:
    """The same through OpenVINO's CPU plugin, from the ONNX operator com.microsoft.MatMulNBits. ImportError where
    openvino or onnx is missing."""
    import onnx
    import openvino

    (m, k), n = data.x.shape, data.outputs
    blocks = data.weights.reshape(n, k // BLOCK, 18)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32).reshape(n, -1)
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4  # Q4_0: weights 0-15 in the low halves, 16-31 in the high
    codes = np.concatenate([low, high], -1)
    packed = np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)  # here: neighbours share a byte
    helper, tensor = onnx.helper, onnx.TensorProto
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4,
                            block_size=BLOCK, accuracy_level=4)
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", tensor.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", tensor.FLOAT, [m, n])],
        [onnx.numpy_helper.from_array(packed, "w"), onnx.numpy_helper.from_array(scales.ravel(), "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17),
                                                    helper.make_opsetid("com.microsoft", 1)])
    core, found = openvino.Core(), []
    for options in OPENVINO_OPTIONS:
        compiled = core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **options})
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(data.x)))

        def run(request: Any = request) -> np.ndarray:
            request.infer()
            return request.get_output_tensor().data

        found.append(run)
    return found[int(np.argmin(_median(found, 1.0)))]


def measure(rows_: int, inputs: int, outputs: int, threads: int, seconds: float = 3.0) -> dict[str, float | str | None]:
    """Operations per second of both, in turns, medians; "error": of our result against OpenVINO's, relative."""
    data = Data.random(rows_, inputs, outputs)
    team = Team(threads)
    try:
        ours = our_product(data, team)
        try:
            theirs = openvino_product(data, threads)
        except Exception as error:  # a missing or failing peer is a remark, not an end
            return {"ours": data.operations / _median([ours], seconds)[0], "openvino": None,
                    "detail": f"OpenVINO: {type(error).__name__}: {str(error)[:200]}"}
        first, second = ours().copy(), theirs().copy()
        error = float(np.abs(first - second).max() / np.abs(second).max())
        a, b = _median([ours, theirs], seconds)
        return {"ours": data.operations / a, "openvino": data.operations / b,
                "detail": f"results differ by {error:.1%}"}
    finally:
        team.close()


def _median(calls: list[Callable], seconds: float) -> list[float]:
    """Median seconds of each, in turns of a few calls."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[-1]) < 3:
        for call, found in zip(calls, times):
            for turn in range(4):
                began = time.perf_counter()
                call()
                if turn:  # the first finds the other's data in the caches
                    found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]
