"""Decode and prefill attention against NumPy in float64 on the stored KV, and what must not change a row's result."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels.attention_decode import decode_attention
from edge_runtime.kernels.isa import current
from tests.kernels.attention_case import Case

SHAPES = [(64, 4), (64, 1), (64, 7), (128, 8), (80, 3), (96, 5), (112, 2), (16, 1), (256, 2), (20, 12)]
# Largest difference from float64 attention on the same stored KV, of outputs whose values are standard normal:
# int8 vectors: 15-bit queries, 14-bit weights; tiles: bf16 queries and weights (8 bits), or two bf16 each for fp16.
BOUNDS = {("int8", False): 6e-4, ("int8", True): 1.6e-2, ("fp16", False): 3e-6, ("fp16", True): 2e-4}


def bound(dtype: str, kind: str) -> float:
    return BOUNDS[dtype, kind == "prefill" and current().matrix_tiles]


def assert_close(result, expected, limit):
    for name, got, want in zip(("o", "lse"), result, expected):
        error = np.abs(got - want).max()
        assert error <= limit, f"{name}: {error:.1e} > {limit:.1e}"


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("head_size,group", SHAPES)
def test_decode(head_size, group, dtype):
    case = Case([(0, 1), (63, 1), (64, 1), (200, 3), (1290, 1)], head_size, group, 2, dtype).fill()
    assert_close(case.attend("decode", threads=2, layers=2), case.expected(), bound(dtype, "decode"))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("head_size,group", [(64, 4), (128, 7), (80, 3), (16, 1), (256, 2), (20, 12)])
def test_prefill(head_size, group, dtype):
    case = Case([(0, 1), (0, 70), (100, 150), (255, 2), (64, 64)], head_size, group, 2, dtype).fill()
    assert_close(case.attend("prefill", threads=2, layers=2), case.expected(), bound(dtype, "prefill"))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 8.0, 60.0])
def test_scores_of_any_size(kind, scale):
    """From keys of zero to softmax that one token takes whole: relative to the scores' own rounding."""
    for dtype in ("int8", "fp16"):
        case = Case([(300, 20)], 64, 4, 1, dtype, seed=5, scale=scale).fill()
        o, lse = case.attend(kind)
        want, want_lse = case.expected()
        assert np.isfinite(o).all()
        limit = bound(dtype, kind) * max(1.0, 4 * scale)
        assert np.abs(o - want).max() <= limit and np.abs(lse - want_lse).max() <= limit


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_arithmetic_adds_little_to_what_int8_kv_costs(kind):
    case = Case([(700, 40)], 64, 4, 2, "int8", seed=11).fill()
    o, _ = case.attend(kind)
    exact, stored = case.expected(stored=False)[0], case.expected()[0]
    kernel, cache = (np.sqrt(np.mean(d ** 2)) for d in (o - stored, stored - exact))
    assert kernel <= cache * (0.03 if bound("int8", kind) < 1e-3 else 0.4), (kernel, cache)


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_decode_and_prefill_agree(dtype):
    case = Case([(500, 9), (0, 3)], 64, 4, 2, dtype, seed=2).fill()
    assert_close(case.attend("decode"), case.attend("prefill"), 2 * bound(dtype, "prefill"))


@pytest.mark.parametrize("group,dtype", [(1, "int8"), (4, "int8"), (7, "int8"), (4, "fp16")])
def test_where_a_prompt_is_cut_changes_nothing(group, dtype):
    whole = Case([(0, 300)], 64, group, 2, dtype, seed=7).fill()
    o, lse = whole.attend("prefill")
    parts = Case([(0, 300)], 64, group, 2, dtype, seed=7).fill()
    start = 0
    for rows in (1, 62, 2, 100, 77, 58):
        parts.slices[0, 1:3] = rows, start
        parts.rows, parts.q = rows, whole.q[start:start + rows]
        part_o, part_lse = parts.attend("prefill")
        assert np.array_equal(part_o, o[start:start + rows])
        assert np.array_equal(part_lse, lse[start:start + rows])
        start += rows


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_neighbours_and_threads_change_nothing(kind):
    slices = [(4000, 1), (90, 1), (1000, 1), (5, 1), (0, 1), (64, 1), (63, 1), (127, 1)]
    together = Case(slices, 64, 4, 2, seed=3).fill()
    o, lse = together.attend(kind, threads=3)
    for i in (0, 2, 5):
        alone = Case(slices, 64, 4, 2, seed=3).fill()
        alone.slices, alone.rows, alone.q = alone.slices[i:i + 1].copy(), 1, alone.q[i:i + 1]
        alone.slices[0, 0] = 0
        one, one_lse = alone.attend(kind)
        assert np.array_equal(one[0], o[i]) and np.array_equal(one_lse[0], lse[i])


def test_standalone_decode_returns_output_and_lse():
    case = Case([(100, 1), (2000, 1)], 80, 4, 2, seed=9).fill()
    o, lse = decode_attention(case.q, case.tables, [101, 2001], case.kv_heads, "int8", record_offset=case.offset,
                              threads=2)
    assert_close((o, lse), case.expected(), bound("int8", "decode"))
    # Two halves of a sequence, each on its own device, merged by log-sum-exp.
    first, second = (decode_attention(case.q[1:], [pages], [count], case.kv_heads, "int8", record_offset=case.offset)
                     for pages, count in ((case.tables[1][:16], 1024), (case.tables[1][16:], 977)))
    total = np.logaddexp(first[1], second[1])
    merged = sum(o * np.exp(part - total)[..., None] for o, part in (first, second))
    assert np.abs(merged[0] - o[1]).max() < 1e-4


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_nan_reaches_the_rows_that_see_it_and_no_other_sequence(kind, dtype):
    for part in ("q", "k", "v"):
        case = Case([(0, 90), (0, 90)], 64, 4, 1, dtype, seed=1)
        if part == "q":
            case.q[70, 2, 5] = np.nan
        else:
            getattr(case, part)[0][70, 0, 5] = np.nan
        ones = np.ones((180, 32), np.float32)
        case.q = case.write_with_kernel(ones, 0 * ones, 64, "neox")[:, :4].copy()
        seen = np.isnan(case.attend(kind)[0]).any(-1)
        if part == "q":
            assert seen[70, 2] and seen.sum() == 1
        else:  # rows of the same page before the token may be lost too: the sequence has failed
            assert seen[70:90].all() and not seen[:64].any() and not seen[90:].any(), part
