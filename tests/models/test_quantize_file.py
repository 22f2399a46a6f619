"""Whole files: metadata kept, types as asked, errors before anything is written."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from edge_runtime.models import quantize_file
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.gguf_writer import array_tensor, write_gguf
from edge_runtime.models.quantize_file import quantize_gguf
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.quant.quantize import quantize
from tests.gguf_factory import write_model


@pytest.fixture
def source(tmp_path):
    return write_model(tmp_path / "source.gguf", types="F32", layers=4, width=256, ffn=512, exit_layers=[2])


def types_of(path) -> dict[str, str]:
    with GGUFFile(path) as file:
        return {info.name: info.type for info in file.tensors.values()}


def test_metadata_and_vectors_are_kept(source, tmp_path):
    target = quantize_gguf(source, tmp_path / "q.gguf", "Q4_K_M")
    with GGUFFile(source) as a, GGUFFile(target) as b:
        assert b.metadata["general.file_type"] == 15 and b.metadata["general.quantization_version"] == 2
        for key in a.metadata:
            if key != "general.file_type":
                assert a.metadata.raw(key) == b.metadata.raw(key)
        for name, info in a.tensors.items():
            if len(info.shape) == 1:
                assert b.tensors[name].type == "F32" and a.data(name).tobytes() == b.data(name).tobytes()
        assert config_from_gguf(a) == config_from_gguf(b)
    assert target.stat().st_size < source.stat().st_size / 4


def test_mixture_pure_and_overrides(source, tmp_path):
    mixed = types_of(quantize_gguf(source, tmp_path / "m.gguf", "q4_k"))
    assert mixed["token_embd.weight"] == "Q6_K" and mixed["blk.3.ffn_down.weight"] == "Q6_K"
    assert mixed["blk.0.attn_q.weight"] == "Q4_K"
    pure = types_of(quantize_gguf(source, tmp_path / "p.gguf", "Q4_0", pure=True))
    assert {kind for name, kind in pure.items() if "norm" not in name} == {"Q4_0"}
    told = {"blk.1.attn_q.weight": "Q8_0", "token_embd.weight": "F16"}
    overridden = types_of(quantize_gguf(source, tmp_path / "o.gguf", "Q4_0", overrides=told))
    assert all(overridden[name] == kind for name, kind in told.items())
    assert overridden["blk.2.attn_q.weight"] == "Q4_0"


def test_chunks_threads_importance_and_progress(source, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_file, "CHUNK_WEIGHTS", 5000)
    importance = np.linspace(0.1, 2, 256).astype(np.float32)
    seen: list[tuple[int, int]] = []
    target = quantize_gguf(source, tmp_path / "q.gguf", "Q4_K_S", threads=3, progress=lambda *at: seen.append(at),
                           importance={"blk.1.attn_q.weight": importance})  # fmt: skip
    with GGUFFile(source) as a, GGUFFile(target) as b:
        for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"):
            by = importance if "blk.1" in name else None
            np.testing.assert_array_equal(b.data(name), quantize(a.floats(name), "Q4_K", by).reshape(-1))
        total = sum(info.size for info in a.tensors.values())
    done = [at for at, _ in seen]
    assert done == sorted(done) and done[-1] == total and {t for _, t in seen} == {total}


def test_logits_stay_close(source, tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 30)
    with GGUFFile(source) as file:
        exact = ReferenceModel.load(file).forward(ids)
    before = np.inf
    for name in ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"):
        with GGUFFile(quantize_gguf(source, tmp_path / "q.gguf", name)) as file:
            off = float(np.abs(ReferenceModel.load(file).forward(ids) - exact).mean())
        assert off < before
        before = off
    assert before < 5e-3


def test_what_is_refused(source, tmp_path):
    target = tmp_path / "q.gguf"
    with pytest.raises(UnsupportedModelError, match="Q3_K_M"):
        quantize_gguf(source, target, "Q3_K_M")
    with pytest.raises(InvalidRequestError, match="another file"):
        quantize_gguf(source, source, "Q4_0")
    with pytest.raises(InvalidRequestError, match="absent"):
        quantize_gguf(source, target, "Q4_0", overrides={"absent": "Q8_0"})
    with pytest.raises(InvalidRequestError, match="divides"):
        quantize_gguf(write_model(tmp_path / "n.gguf", types="F32"), target, "Q4_0",
                      overrides={"blk.0.attn_q.weight": "Q4_K"})  # fmt: skip
    parts = write_gguf(tmp_path / "parts.gguf", {"split.count": [2, 3]},
                       [array_tensor("a", np.zeros((4, 32), np.float32))])
    with pytest.raises(UnsupportedModelError, match="several files"):
        quantize_gguf(parts, target, "Q4_0")
    with pytest.raises(ModelNotFoundError):
        quantize_gguf(tmp_path / "absent.gguf", target, "Q4_0")
    with pytest.raises(UnsupportedModelError, match=r"from Q6_K .*Start from the float file"):
        quantize_gguf(quantize_gguf(source, tmp_path / "q4.gguf", "Q4_0"), target, "Q8_0")
    with pytest.raises(UnsupportedModelError, match="several files"):
        split = write_model(tmp_path / "s.gguf", types="F32", metadata={"split.count": 2})
        quantize_gguf(split, target, "Q4_0")
    assert not target.exists()
