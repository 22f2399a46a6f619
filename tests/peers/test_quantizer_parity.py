"""Our quantizers against ggml's: bytes where both round, errors where both search, and the mixtures of whole files."""
from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.peers
pytest.importorskip("llama_cpp")

from edge_runtime.models.gguf_file import GGUFFile  # noqa: E402
from edge_runtime.models.quantize_file import quantize_gguf  # noqa: E402
from edge_runtime.quant.dequantize import dequantize  # noqa: E402
from edge_runtime.quant.mixtures import FILE_TYPES  # noqa: E402
from edge_runtime.quant.quantize import quantize  # noqa: E402
from tests.gguf_factory import write_model  # noqa: E402
from tests.peers.llama_cpp_model import ggml_quantize, llama_cpp_quantize_file  # noqa: E402


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "normal": 0.02 * rng.standard_normal((256, 1024), np.float32),
        "laplace": rng.laplace(0, 0.02, (256, 1024)).astype(np.float32),
        "heavy tails": (0.01 * rng.standard_t(4, (256, 1024))).astype(np.float32),
        "shifted": (0.02 * rng.standard_normal((256, 1024)) + 0.03).astype(np.float32),
        "rows of other sizes": (rng.lognormal(-4, 1, (256, 1)) * rng.standard_normal((256, 1024))).astype(np.float32),
        "columns of other sizes": (rng.lognormal(-4, 1, 1024) * rng.standard_normal((256, 1024))).astype(np.float32),
        "mostly zero": np.where(rng.random((256, 1024)) < 0.05, rng.standard_normal((256, 1024)), 0).astype(np.float32),
    }


def errors(weights: np.ndarray, name: str, by: np.ndarray | float, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Our weighted squared error over theirs."""
    mean = lambda raw: float((by * (dequantize(raw, name, weights.shape) - weights).astype(np.float64) ** 2).mean())
    return mean(ours) / mean(theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_bytes_of_plain_rounding(name):
    for kind, weights in samples().items():
        same = quantize(weights, name, method="plain") == ggml_quantize(weights, name)
        assert same.mean() > 0.9999, kind  # the compilers' fused multiply-adds may move a tie


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_error_of_the_search(name):
    """At most 3 % above ggml's; in fact below it."""
    for kind, weights in samples().items():
        ratio = errors(weights, name, 1.0, quantize(weights, name, method="search"), ggml_quantize(weights, name))
        print(f"{name} {kind}: {ratio:.4f}")
        assert ratio < 1.03, kind


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_error_with_importance(name):
    """In the error that the importance asks for; ggml multiplies it by a heuristic of its own."""
    importance = np.random.default_rng(6).lognormal(0, 1.5, 1024).astype(np.float32)
    for kind, weights in samples().items():
        ours, theirs = quantize(weights, name, importance), ggml_quantize(weights, name, importance)
        ratio = errors(weights, name, importance, ours, theirs)
        print(f"{name} {kind}: {ratio:.4f}")
        assert ratio < 1.03, kind


SHAPES = {
    "256 divides": {"width": 256, "ffn": 512, "layers": 8},
    "only 32 divides": {"width": 96, "ffn": 288, "heads": 3, "kv_heads": 1, "layers": 9, "tied": False},
    "ffn falls back": {"width": 256, "ffn": 528, "layers": 5, "architecture": "qwen2"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_files_hold_the_types_that_llama_cpp_chooses(tmp_path, shape):
    source = write_model(tmp_path / "source.gguf", types="F32", **SHAPES[shape])
    for name, chosen in FILE_TYPES.items():
        llama_cpp_quantize_file(source, tmp_path / "theirs.gguf", chosen.number)
        quantize_gguf(source, tmp_path / "ours.gguf", name, threads=1)
        with GGUFFile(tmp_path / "theirs.gguf") as theirs, GGUFFile(tmp_path / "ours.gguf") as ours:
            assert {t.name: t.type for t in ours.tensors.values()} == {t.name: t.type for t in theirs.tensors.values()}
            assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
            with GGUFFile(source) as file:
                off = lambda other: sum(float(((other.floats(t) - file.floats(t)) ** 2).sum()) for t in file.tensors)
                assert off(ours) <= 1.03 * off(theirs)
