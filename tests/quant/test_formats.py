"""The table of formats against the constants of the gguf package."""
from __future__ import annotations

import gguf
import pytest

from edge_runtime.errors import UnsupportedModelError
from edge_runtime.quant.formats import FORMATS, FORMATS_BY_NUMBER, OTHER_FORMATS_BY_NUMBER, block_format


def test_sizes_and_numbers_are_those_of_gguf():
    known = FORMATS_BY_NUMBER | OTHER_FORMATS_BY_NUMBER
    for kind in gguf.GGMLQuantizationType:
        if kind.name == "Q8_1":  # 36 bytes in ggml since 2024; the package still says 40. No file holds it.
            continue
        if kind not in known:  # a later gguf package knows more
            continue
        assert known[kind].name == kind.name
        assert (known[kind].block_size, known[kind].block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert len(FORMATS) == 11 and not FORMATS_BY_NUMBER.keys() & OTHER_FORMATS_BY_NUMBER.keys()


def test_row_bytes():
    assert block_format("Q4_0").row_bytes(64) == 36
    assert block_format("q6_k").bits_per_weight == 6.5625
    assert block_format("F16").is_float and not block_format("Q8_0").is_float
    with pytest.raises(ValueError, match=r"100 .* Q4_K block of 256"):
        block_format("Q4_K").row_bytes(100)


def test_unknown_format_is_named():
    with pytest.raises(UnsupportedModelError, match="'Q3_K'") as caught:
        block_format("Q3_K")
    assert caught.value.supported == tuple(FORMATS)
