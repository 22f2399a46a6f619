"""The writer against our reader and the official one; nothing half-written is left behind."""
from __future__ import annotations

import gguf
import numpy as np
import pytest

from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.gguf_writer import TensorSource, array_tensor, write_gguf
from edge_runtime.quant.formats import block_format
from edge_runtime.quant.quantize import quantize

METADATA = {
    "general.architecture": "llama", "text": "Größe\0", "yes": True, "small": 7, "minus": -7, "big": 2**40,
    "deep": -(2**40), "real": 0.5, "words": ["", "ein", "zwei"], "numbers": [1, 2, 3], "signed": [-1, 2],
    "reals": [0.5, 1.5], "flags": [True, False], "array": np.arange(5, dtype=np.int16), "none": [],
    "scalar": np.float32(0.25),
}  # fmt: skip


def test_round_trip(tmp_path):
    matrix = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    tensors = [array_tensor("vector", np.arange(5, dtype=np.float32)),
               array_tensor("matrix", quantize(matrix, "Q4_0"), "Q4_0", (6, 64)),
               array_tensor("cube", np.zeros((2, 3, 4), np.float16), "F16")]  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    with GGUFFile(path) as file:
        for key, value in METADATA.items():
            read = file.metadata[key]
            assert (list(read) if isinstance(value, (list, np.ndarray)) else read) == (
                list(value) if isinstance(value, (list, np.ndarray)) else value
            )
        kinds = {key: file.metadata.type_name(key) for key in METADATA}
        assert (kinds["small"], kinds["minus"], kinds["big"], kinds["deep"]) == ("uint32", "int32", "uint64", "int64")
        assert [info.shape for info in file.tensors.values()] == [(5,), (6, 64), (2, 3, 4)]
        assert file.data("matrix").tobytes() == quantize(matrix, "Q4_0").tobytes()
        assert file.floats("vector").tolist() == [0, 1, 2, 3, 4]
        assert all(info.offset % 32 == 0 for info in file.tensors.values())
    reader = gguf.GGUFReader(str(path))
    assert [t.name for t in reader.tensors] == ["vector", "matrix", "cube"]
    assert bytes(reader.fields["text"].parts[-1]).decode() == METADATA["text"]


def test_existing_file_stays_until_the_new_one_is_complete(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"a": 1}, [])
    before = path.read_bytes()

    def broken():
        yield np.zeros(16, np.float32)
        raise RuntimeError("the source went away")

    with pytest.raises(RuntimeError):
        write_gguf(path, {"a": 2}, [TensorSource("t", (32,), block_format("F32"), broken)])
    with pytest.raises(ValueError, match="64 bytes for a F32 tensor of 128"):
        write_gguf(path, {"a": 2}, [TensorSource("t", (32,), block_format("F32"), lambda: [bytes(64)])])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [None, object(), {"a": 1}, [1, "a"], [[1]], 2**64, [2**64], np.zeros(2, complex)])
def test_values_that_gguf_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match="GGUF metadata"):
        write_gguf(tmp_path / "m.gguf", {"key": value}, [])
    assert not list(tmp_path.iterdir())
