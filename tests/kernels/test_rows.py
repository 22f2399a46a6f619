"""Norm, SiLU and the three forms of a row, against NumPy."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels import rows, step_state
from edge_runtime.kernels.memory import aligned
from tests.kernels.blocks import quantize_rows, run


class Case:
    """Buffers of a rows operation on `m` rows of `width` values, `few` of them to be written as int8."""

    def __init__(self, m: int, width: int, few: int):
        self.m, self.width, self.k = m, width, -(-width // 32) * 32
        self.a, self.b = aligned(m * self.k, np.float32).reshape(m, -1), aligned(m * self.k, np.float32).reshape(m, -1)
        self.q2, self.scale2 = np.zeros((2, m, self.k), np.int8), np.zeros((2, m, self.k // 32), np.float32)
        self.sums2, self.halves2 = np.zeros((2, m, self.k // 32), np.int32), np.zeros((2, m, self.k // 16), np.int32)
        self.q, self.scale, self.sums, self.halves = self.q2[0], self.scale2[0], self.sums2[0], self.halves2[0]
        self.tiles = np.zeros((-(-m // 16), self.k // 32, 16, 32), np.uint16)
        self.out = np.zeros((m, self.k), np.float32)
        self.step = np.zeros(len(step_state.NAMES), np.int64)
        self.step[step_state.ROWS], self.step[step_state.FEW_ROWS] = m, few

    def run(self, kind: int, forms: int, index: np.ndarray | None = None, eps: float = 1e-5) -> None:
        epsilon, scratch = np.array([eps], np.float32), aligned(self.k, np.float32)
        if index is not None:
            self.step[step_state.LOGIT_INDEX] = index.ctypes.data
        run(rows.rows_kernel(), rows.operands(
            counter=0, step=self.step.ctypes.data, rows_at=step_state.ROWS,
            index_at=step_state.ZERO if index is None else step_state.LOGIT_INDEX, kind=kind, a=self.a.ctypes.data,
            a_stride=self.k * 4, b=self.b.ctypes.data, b_stride=self.k * 4, width=self.k, true_width=self.width,
            eps=epsilon.ctypes.data, forms=forms, q=self.q.ctypes.data, q_stride=self.k,
            q_scale=self.scale.ctypes.data, q_scale_stride=self.k // 8, q_sum=self.sums.ctypes.data,
            q_half=self.halves.ctypes.data, q_half_stride=self.k // 4, bf16=self.tiles.ctypes.data,
            bf16_tiles=self.k // 32, out=self.out.ctypes.data, out_stride=self.k * 4, scratch=scratch.ctypes.data,
            scratch_stride=0, q_low=self.q.nbytes, scale_low=self.scale.nbytes, half_low=self.halves.nbytes))

    def bf16(self) -> np.ndarray:
        """The tiles as float32 rows."""
        rows_ = self.tiles.transpose(0, 2, 1, 3).reshape(-1, self.k)
        return (rows_.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("width", [32, 100, 896])
def test_norm(width):
    rng = np.random.default_rng(width)
    case = Case(5, width, 5)
    case.a[:, :width] = rng.standard_normal((5, width)) * 10
    case.b[0, :width] = 1 + rng.standard_normal(width) / 10
    case.run(rows.NORM, rows.FLOAT)
    x = case.a[:, :width].astype(np.float64)
    want = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * case.b[0, :width]
    assert np.abs(case.out[:, :width] - want).max() < 3e-6 * np.abs(want).max()
    assert not case.out[:, width:].any()


def test_silu_is_finite_and_right_from_end_to_end():
    case = Case(1, 96, 1)
    case.a[0] = np.concatenate([np.linspace(-200, 200, 64), np.linspace(-5, 5, 32)])
    case.b[0] = np.linspace(-3, 3, 96)
    case.run(rows.SILU, rows.FLOAT)
    g = case.a[0].astype(np.float64)
    want = g / (1 + np.exp(-g)) * case.b[0]
    assert np.abs(case.out[0] - want).max() < 1e-6 * np.abs(want).max()


def test_few_rows_become_int8_and_the_others_bf16_tiles():
    seed = 8
    print("seed", seed)
    rng = np.random.default_rng(seed)
    case = Case(40, 128, 7)
    case.a[:] = rng.standard_normal(case.a.shape) * 3
    case.a[3, 32:64] = 0
    case.run(rows.COPY, rows.INT8 | rows.BF16_TILE)
    q, scale, _, _ = quantize_rows(case.a[:7])
    assert np.abs(case.q[:7].astype(int) - q).max() <= 1 and (case.q[:7] != q).mean() < 0.01  # ties
    assert np.allclose(case.scale[:7], scale, rtol=1e-6)
    assert np.array_equal(case.sums[:7], -case.q[:7].reshape(7, -1, 32).astype(np.int32).sum(-1))
    assert np.array_equal(case.halves[:7], -case.q[:7].reshape(7, -1, 16).astype(np.int32).sum(-1))
    assert not case.q[7:].any()
    back = case.bf16()
    assert np.abs(back[:33] - case.a[7:]).max() <= 2 ** -8 * np.abs(case.a).max()
    assert not back[33:].any()


def test_what_rounding_left_is_a_second_int8_row():
    seed = 9
    print("seed", seed)
    case = Case(3, 96, 3)
    case.a[:] = np.random.default_rng(seed).standard_normal(case.a.shape)
    case.run(rows.COPY, rows.INT8 | rows.INT8_TWICE)
    stands_for = (case.q2.reshape(2, 3, -1, 32) * case.scale2[..., None]).sum(0).reshape(3, 96)
    assert np.abs(stands_for - case.a).max() < 2 ** -14 * np.abs(case.a).max()
    assert np.array_equal(case.sums2, -case.q2.reshape(2, 3, -1, 32).astype(np.int32).sum(-1))


def test_chosen_rows_in_the_order_asked():
    case = Case(4, 32, 4)
    case.a[:] = np.arange(4)[:, None]
    case.run(rows.COPY, rows.FLOAT, np.array([3, 0, 0, 2], np.int32))
    assert case.out[:, 0].tolist() == [3, 0, 0, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_lost_in_quantization(bad):
    case = Case(2, 64, 2)
    case.a[:] = 1
    case.a[1, 40] = bad
    case.run(rows.COPY, rows.INT8)
    assert np.isfinite(case.scale[0]).all() and np.isfinite(case.scale[1, 0])
    assert not np.isfinite(case.scale[1, 1])
