"""RoPE + KV write against NumPy: queries and keys in place, records byte for byte."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.kernels import attention_reference as reference
from edge_runtime.kernels import rope
from edge_runtime.kernels.kv_record import KV_DTYPES, RecordLayout, padded_head, record_bytes
from tests.kernels.attention_case import Case

SLICES = [(0, 1), (61, 5), (130, 1), (0, 130), (7, 3)]


def angles(case: Case, rotary: int, rng) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(-7, 7, (case.rows, rotary // 2))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize("head_size,group,rotary,style,dtype,normed", [
    (64, 4, 64, "norm", "int8", False),
    (64, 7, 64, "neox", "int8", False),
    (128, 2, 128, "neox", "fp16", True),
    (80, 1, 20, "neox", "int8", False),
    (96, 3, 48, "norm", "fp16", False),
    (112, 8, 112, "norm", "int8", True),
    (20, 2, 12, "neox", "int8", True),
    (16, 1, 16, "norm", "fp16", False),
    (256, 1, 256, "neox", "int8", True),
])
@pytest.mark.parametrize("threads", [1, 3])
def test_rope_and_kv_write(head_size, group, rotary, style, dtype, normed, threads):
    rng = np.random.default_rng(head_size + group)
    case = Case(SLICES, head_size, group, 2, dtype, seed=group)
    before = {s: case.k[s][:int(case.slices[s, 2])] for s in range(len(SLICES))}
    cos, sin = angles(case, rotary, rng)
    norms = tuple(rng.uniform(0.5, 2, head_size).astype(np.float32) for _ in range(2)) if normed else None
    queries = case.q.copy()
    qkv = case.write_with_kernel(cos, sin, rotary, style, norms, threads=threads)

    if normed:
        queries = reference.rms_norm(queries, norms[0], 1e-6)
    want = reference.rotate(queries, cos, sin, style)
    np.testing.assert_allclose(qkv[:, :case.heads], want, rtol=2e-6, atol=2e-6)
    for s, (first, rows, position, _) in enumerate(case.slices.tolist()):
        keys = case.k[s][position:]
        if normed:
            keys = reference.rms_norm(keys, norms[1], 1e-6)
        keys = reference.rotate(keys, cos[first:first + rows], sin[first:first + rows], style)
        written = qkv[first:first + rows, case.heads:case.heads + case.kv_heads]
        np.testing.assert_allclose(written, keys, rtol=2e-6, atol=2e-6)
        assert np.array_equal(qkv[first:first + rows, case.heads + case.kv_heads:], case.v[s][position:])
        # The records: from the kernel's own rotated keys the oracle must write the same bytes.
        other = Case(SLICES, head_size, group, 2, dtype, seed=group)
        for t in range(position, position + rows):
            for head in range(2):
                reference.write_token(other.record(s, t // 64, head), case.layout, t % 64, written[t - position, head],
                                      case.v[s][t, head])
        for page in range(len(case.pages[s])):
            for head in range(2):
                assert np.array_equal(case.record(s, page, head), other.record(s, page, head)), (s, page, head)
            untouched = case.pages[s][page][:case.offset]
            assert (untouched == 255).all()
    assert before


def test_a_zero_head_has_scale_zero_and_keeps_its_neighbours():
    case = Case([(5, 2)], 64, 1, 1)
    case.k[0][6], case.v[0][6] = 0, 0
    ones, zeros = np.ones((2, 32), np.float32), np.zeros((2, 32), np.float32)
    case.write_with_kernel(ones, zeros, 64, "neox")
    k, v = case.unpacked(0)
    assert (k[6] == 0).all() and (v[6] == 0).all()
    for stored, wanted in ((k[5], case.k[0][5]), (v[5], case.v[0][5])):
        assert np.abs(stored - wanted).max() <= np.abs(wanted).max() / 127 * 0.501


def test_a_page_written_token_by_token_equals_one_written_at_once():
    whole = Case([(0, 70)], 64, 2, 2, seed=3)
    cos, sin = angles(whole, 64, np.random.default_rng(1))
    whole.write_with_kernel(cos, sin, 64, "norm")
    steps = Case([(0, 70)], 64, 2, 2, seed=3)
    q, k, v, slices = steps.q, steps.k[0], steps.v[0], steps.slices.copy()
    for t in range(70):
        steps.rows, steps.q, steps.k, steps.v = 1, q[t:t + 1], [k[:t + 1]], [v[:t + 1]]
        steps.slices[0] = 0, 1, t, slices[0, 3]
        steps.write_with_kernel(cos[t:t + 1], sin[t:t + 1], 64, "norm")
    for page in range(2):
        assert np.array_equal(whole.pages[0][page], steps.pages[0][page])


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("head_size", [16, 20, 64, 80, 96, 112, 128, 256])
def test_record_sizes(dtype, head_size):
    padded = padded_head(head_size)
    assert padded % 16 == 0 and head_size <= padded < head_size + 16
    assert record_bytes(dtype, head_size) == 64 * padded * 2 * (1 if dtype == "int8" else 2) + (
        512 if dtype == "int8" else 0)
    layout = RecordLayout(dtype, head_size)
    rng = np.random.default_rng(0)
    record = np.zeros(layout.bytes, np.uint8)
    k, v = rng.standard_normal((2, 64, head_size)).astype(np.float32)
    for t in rng.permutation(64):
        reference.write_token(record, layout, t, k[t], v[t])
    for stored, wanted in zip(reference.unpack(record, layout), (k, v)):
        error = np.abs(stored - wanted).max(-1)
        assert (error <= np.abs(wanted).max(-1) * (0.501 / 127 if dtype == "int8" else 1 / 2048)).all()


def test_what_rope_refuses():
    with pytest.raises(ValueError, match="style"):
        rope.make_rope(64, 4, "int8", 64, "gptj", False, 1e-6)
    with pytest.raises(ValueError, match="rotary"):
        rope.make_rope(64, 4, "int8", 66, "norm", False, 1e-6)
    with pytest.raises(ValueError, match="KV dtype"):
        record_bytes("int4", 64)
