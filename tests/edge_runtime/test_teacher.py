"""A teacher's logits through the CPU device are the reference's."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime import teacher as teacher_module
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.teacher import Teacher
from tests.devices.steps import divergence
from tests.gguf_factory import write_model


@pytest.mark.parametrize("case", [{}, {"architecture": "qwen2", "types": "Q8_0", "tied": False}])
def test_logits_of_a_text_in_pieces(tmp_path, monkeypatch, case):
    path = write_model(tmp_path / "m.gguf", **{"types": "F16", **case})
    ids = np.random.default_rng(0).integers(0, 300, 150).astype(np.int32)
    monkeypatch.setattr(teacher_module, "PIECE_BYTES", 64 * 300 * 4)
    with GGUFFile(path) as file:
        want = ReferenceModel.load(file).forward(ids)
    with Teacher(path, context=150, threads=1) as teacher:
        pieces = [piece.copy() for piece in teacher.logits(ids)]
        assert [len(piece) for piece in pieces] == [64, 64, 22]
        assert divergence(want, np.concatenate(pieces)) < 2e-3
        again = [piece.copy() for piece in teacher.logits(ids)]
        np.testing.assert_array_equal(np.concatenate(again), np.concatenate(pieces))
        with pytest.raises(InvalidRequestError, match="151"):
            next(teacher.logits(np.zeros(151, np.int32)))


def test_fingerprints_tell_models_and_vocabularies_apart(tmp_path):
    same = [write_model(tmp_path / f"{seed}.gguf", seed=seed) for seed in (0, 1)]
    other = write_model(tmp_path / "wide.gguf", vocab=310)
    found = []
    for path in (*same, other):
        with Teacher(path, context=64, threads=1) as teacher:
            found.append((teacher.fingerprint, teacher.tokenizer_fingerprint))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1] != found[2][1]
