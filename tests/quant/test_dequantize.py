"""Every format, bit for bit against gguf.quants on random bytes, and one block of each by hand."""
from __future__ import annotations

import warnings

import gguf
import gguf.quants
import numpy as np
import pytest

from edge_runtime.quant import dequantize as module
from edge_runtime.quant.dequantize import dequantize
from edge_runtime.quant.formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_agree_with_gguf(name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BLOCKS", 64)  # several chunks
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    format = FORMATS[name]
    inputs = 3 * format.block_size
    data = np.random.default_rng(seed).integers(0, 256, (150, format.row_bytes(inputs)), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # infinite and NaN scales
        ours = dequantize(data, format, (150, inputs))
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(150, inputs)
    assert ours.dtype == np.float32 and ours.shape == (150, inputs)
    np.testing.assert_array_equal(ours, theirs)
    finite = np.isfinite(ours)
    np.testing.assert_array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))


def test_blocks_by_hand():
    half = lambda x: np.array([x], "<f2").tobytes()
    nibbles = bytes(range(16, 32))  # low nibbles 0-15, high nibbles 1
    q4_0 = dequantize(np.frombuffer(half(0.5) + nibbles, np.uint8), "Q4_0", (1, 32))[0]
    assert q4_0.tolist() == [0.5 * (i - 8) for i in range(16)] + [-3.5] * 16
    q4_1 = dequantize(np.frombuffer(half(0.5) + half(-1) + nibbles, np.uint8), "Q4_1", (1, 32))[0]
    assert q4_1.tolist() == [0.5 * i - 1 for i in range(16)] + [-0.5] * 16
    q5_0 = dequantize(np.frombuffer(half(2) + b"\x01\0\0\x80" + nibbles, np.uint8), "Q5_0", (1, 32))[0]
    assert q5_0[0] == 2 * (16 - 16) and q5_0[1] == 2 * (1 - 16) and q5_0[31] == 2 * (17 - 16)
    q8_0 = dequantize(np.frombuffer(half(0.25) + bytes([128, 255, 127]) + bytes(29), np.uint8), "Q8_0", (1, 32))[0]
    assert q8_0[:4].tolist() == [-32.0, -0.25, 31.75, 0.0]
    scales = bytes([1, 2, 3, 4]) + bytes([5, 6, 7, 8]) + bytes([0x21] * 4)  # groups 4-7: scale 1, minimum 2
    q4_k = dequantize(np.frombuffer(half(1) + half(0.5) + scales + bytes([0x73]) * 128, np.uint8), "Q4_K", (1, 256))[0]
    expected = [1 * 3 - 0.5 * 5, 2 * 7 - 0.5 * 6, 3 * 3 - 0.5 * 7, 4 * 7 - 0.5 * 8, 3 - 1, 7 - 1, 3 - 1, 7 - 1]
    assert q4_k.reshape(8, 32)[:, 0].tolist() == expected
    assert dequantize(np.array([0x80, 0x3F, 0x00, 0xC0], np.uint8), "BF16", (2,)).tolist() == [1.0, -2.0]


def test_wrong_size_is_refused():
    with pytest.raises(ValueError, match="takes 36 bytes, not 35"):
        dequantize(np.zeros(35, np.uint8), "Q4_0", (2, 32))
    with pytest.raises(ValueError, match="multiple"):
        dequantize(np.zeros(18, np.uint8), "Q4_0", (1, 31))


def test_shapes_of_any_rank():
    data = np.random.default_rng(0).integers(0, 60, 6 * 18, dtype=np.uint8)
    flat = dequantize(data, "Q4_0", (6, 32))
    np.testing.assert_array_equal(dequantize(data, "Q4_0", (2, 3, 32)).reshape(6, 32), flat)
    np.testing.assert_array_equal(dequantize(data.reshape(6, 18), "Q4_0", (192,)), flat.reshape(-1))
