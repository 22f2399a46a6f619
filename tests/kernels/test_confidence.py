"""Confidence of a row of logits beside its NumPy oracle."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels.confidence import CRITERIA, SCRATCH_FLOATS, confidence_reference, row_argmax, row_confidence
from edge_runtime.kernels.memory import aligned


def measured(logits: np.ndarray, criterion: int) -> float:
    width = len(logits)
    padded = -(-width // 16) * 16
    row, scratch = aligned(padded, np.float32), aligned(SCRATCH_FLOATS, np.float32)
    row[:width], row[width:] = logits, 1e9  # what lies behind a row must not count
    return row_confidence()(row.ctypes.data, width, padded, criterion, scratch.ctypes.data)


@pytest.mark.parametrize("width", [16, 300, 1003, 4096])
@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy"])
def test_confidence_is_the_oracles(width, criterion):
    seed = width
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for scale in (0.01, 1.0, 8.0, 60.0):
        logits = (rng.standard_normal(width) * scale).astype(np.float32)
        got, want = measured(logits, CRITERIA.index(criterion)), confidence_reference(logits, criterion)
        assert got == pytest.approx(want, abs=2e-6)


def test_certain_and_undecided_rows():
    sure = np.full(50, -100.0, np.float32)
    sure[7] = 100.0
    for criterion in range(3):
        assert measured(sure, criterion) == pytest.approx(1.0, abs=1e-6)
        assert measured(np.zeros(50, np.float32), criterion) == pytest.approx(1 / 50 if criterion == 0 else 0, abs=1e-6)


@pytest.mark.parametrize("criterion", [0, 1, 2])
def test_logits_that_are_not_numbers_give_no_confidence(criterion):
    logits = np.zeros(40, np.float32)
    logits[3] = np.nan
    assert not measured(logits, criterion) >= 0.0


def test_argmax_is_the_first_of_equals():
    row, scratch = aligned(64, np.float32), aligned(SCRATCH_FLOATS, np.float32)
    row[[9, 40]] = 5.0
    row[50:] = 7.0  # beyond the width
    assert row_argmax()(row.ctypes.data, 50, 64, scratch.ctypes.data) == 9
