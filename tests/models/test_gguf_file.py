"""The reader: what it reads from good files, and which byte it names in bad ones."""
from __future__ import annotations

import os
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from edge_runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from edge_runtime.models import gguf_metadata
from edge_runtime.models.gguf_file import GGUFFile
from tests.gguf_factory import bpe_vocabulary, write_model
from tests.models.gguf_bytes import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Draft,
    array,
    scalar,
    text,
    u32,
    u64,
)


def open_bytes(tmp_path, raw: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return GGUFFile(path)


# Each case: the draft, the place (or byte) that the error must name, bytes beyond it, a part of the reason.
HOSTILE = {
    "magic": (Draft(magic=b"GGUX"), 0, "not a GGUF file"),
    "version 0": (Draft(version=0), 4, "no GGUF version"),
    "absurd version": (Draft(version=0x7FFFFFFF), 4, "no GGUF version"),
    "2^64 - 1 tensors": (Draft(tensor_count=2**64 - 1), "tensor_count", "cannot fit"),
    "more tensors than bytes": (Draft(tensor_count=1000), "tensor_count", "cannot fit"),
    "2^63 pairs": (Draft(pair_count=2**63), "pair_count", "cannot fit"),
    "more pairs than bytes": (Draft(pair_count=1000), "pair_count", "cannot fit"),
    "200,000 tensors": (Draft(tensor_count=200_000, data_bytes=8_000_000), "tensor_count", "limit"),
    "100,000 pairs": (Draft(pair_count=100_000, data_bytes=8_000_000), "pair_count", "limit"),
    "empty key": (Draft(pairs=[("", scalar(UINT32, 1))]), "key:", "empty"),
    "key twice": (Draft(pairs=[ARCHITECTURE, ARCHITECTURE]), "key:1", "twice"),
    "key of 2^60 bytes": (Draft(pairs=[(b"", b"")], tensors=[]), None, "bytes long"),
    "key of 70,000 bytes": (Draft(pairs=[("k" * 70_000, scalar(UINT32, 1))]), "key:" + "k" * 70_000, "limit is 65535"),
    "key not UTF-8": (Draft(pairs=[(b"ab\xff", scalar(UINT32, 1))]), ("key:0", 8 + 2), "UTF-8"),
    "value type 13": (Draft(pairs=[("k", u32(13))]), "type:k", "unknown value type 13"),
    "bool of 2": (Draft(pairs=[("k", scalar(BOOL, 2))]), "value:k", "bool"),
    "string of 2^63 bytes": (Draft(pairs=[("k", u32(STRING) + u64(2**63))]), "value:k", "bytes long"),
    "string of 17 MB": (Draft(pairs=[("k", u32(STRING) + u64(17 << 20))], data_bytes=18 << 20), "value:k", "limit"),
    "string not UTF-8": (Draft(pairs=[("k", u32(STRING) + text(b"a\xc3"))]), ("value:k", 8 + 1), "UTF-8"),
    "array of type 99": (Draft(pairs=[("k", array(99, []))]), "value:k", "unknown type 99"),
    "array of 2^61 numbers": (Draft(pairs=[("k", array(UINT32, [], 2**61))]), ("value:k", 4), "claims"),
    "array of 2^61 strings": (Draft(pairs=[("k", array(STRING, [], 2**61))]), ("value:k", 4), "claims"),
    "array count overflows": (Draft(pairs=[("k", array(UINT64, [], 2**64 - 1))]), ("value:k", 4), "claims"),
    "string of an array leaves the file": (
        Draft(pairs=[("k", u32(ARRAY) + u32(STRING) + u64(3) + text("one") + u64(2**40))]),
        ("value:k", 12 + 11),
        "string 1",
    ),
    "string length of an array overflows": (
        Draft(pairs=[("k", u32(ARRAY) + u32(STRING) + u64(2) + text("one") + u64(2**64 - 1))]),
        ("value:k", 12 + 11),
        "string 1",
    ),
    "arrays nested too deep": (
        Draft(pairs=[("k", u32(ARRAY) + (u32(ARRAY) + u64(1)) * 40 + u32(UINT8) + u64(0))]),
        ("value:k", 3 * 12),
        "deeper",
    ),
    "too many nested arrays": (
        Draft(pairs=[("k", u32(ARRAY) + u32(ARRAY) + u64(5000) + (u32(UINT8) + u64(0)) * 5000)]),
        ("value:k", 4),
        "nests more than",
    ),
    "alignment 0": (Draft(pairs=[("general.alignment", scalar(UINT32, 0))]), "value:general.alignment", "power of two"),
    "alignment 4": (Draft(pairs=[("general.alignment", scalar(UINT32, 4))]), "value:general.alignment", "power of two"),
    "alignment 48": (
        Draft(pairs=[("general.alignment", scalar(UINT32, 48))]), "value:general.alignment", "power of two"
    ),
    "alignment 2^31": (
        Draft(pairs=[("general.alignment", scalar(UINT32, 2**31))]), "value:general.alignment", "power of two"
    ),
    "alignment a float": (
        Draft(pairs=[("general.alignment", scalar(FLOAT32, 32.0))]), "value:general.alignment", "type float32"
    ),
    "alignment negative": (
        Draft(pairs=[("general.alignment", scalar(INT32, -32))]), "value:general.alignment", "power of two"
    ),
    "tensor without name": (Draft(tensors=[("", [32], 0, 0)]), "tensor:", "no name"),
    "tensor twice": (Draft(tensors=[("a", [32], 0, 0), ("a", [32], 0, 128)]), "tensor:1", "twice"),
    "tensor name of 300 bytes": (Draft(tensors=[("n" * 300, [32], 0, 0)]), "tensor:" + "n" * 300, "limit is 255"),
    "0 dimensions": (Draft(n_dims=0), "n_dims:a", "0 dimensions"),
    "5 dimensions": (Draft(tensors=[("a", [1, 1, 1, 1, 32], 0, 0)]), "n_dims:a", "5 dimensions"),
    "2^32 - 1 dimensions": (Draft(n_dims=2**32 - 1), "n_dims:a", "dimensions"),
    "dimension of 0": (Draft(tensors=[("a", [32, 0], 0, 0)]), ("dims:a", 8), "dimension of 0"),
    "dimensions overflow": (Draft(tensors=[("a", [2**32, 2**32, 2**32], 0, 0)]), "dims:a", "overflow"),
    "dimensions wrap to 32": (Draft(tensors=[("a", [32, 2**63, 2], 0, 0)]), "dims:a", "overflow"),
    "larger than the file": (Draft(tensors=[("a", [2**40], 0, 0)]), "dims:a", "takes"),
    "tensor type 4,000,000": (Draft(tensors=[("a", [32], 4_000_000, 0)]), "dtype:a", "unknown type"),
    "row of 33 in Q4_0": (Draft(tensors=[("a", [33, 32], 2, 0)]), "dims:a", "multiple of the Q4_0 block of 32"),
    "row of 32 in Q4_K": (Draft(tensors=[("a", [32, 8], 12, 0)]), "dims:a", "multiple of the Q4_K block of 256"),
    "offset not aligned": (Draft(tensors=[("a", [32], 0, 7)]), "offset:a", "multiple of 32"),
    "offset past the end": (Draft(tensors=[("a", [32], 0, 1 << 20)]), "offset:a", "ends at byte"),
    "offset of 2^63": (Draft(tensors=[("a", [32], 0, 2**63)]), "offset:a", "ends at byte"),
    "offset wraps": (Draft(tensors=[("a", [32], 0, 2**64 - 32)]), "offset:a", "ends at byte"),
    "last byte missing": (Draft(tensors=[("a", [1024], 0, 0)], data_bytes=4095), "offset:a", "ends at byte"),
    "overlap": (Draft(tensors=[("a", [32], 0, 0), ("b", [32], 0, 96)]), "offset:b", "'b' overlaps 'a'"),
    "same place": (Draft(tensors=[("a", [32], 0, 128), ("b", [8], 0, 128)]), "offset:b", "'b' overlaps 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_names_the_byte(tmp_path, case):
    draft, place, reason = HOSTILE[case]
    raw = draft.build()
    if place is None:  # a key whose length says 2^60
        raw, offset = raw[:24] + u64(2**60) + raw[32:], 24
    elif isinstance(place, tuple):
        offset = draft.places[place[0]] + place[1]
    else:
        offset = place if isinstance(place, int) else draft.places[place]
    tracemalloc.start()
    with pytest.raises(CorruptModelError, match=reason) as caught:
        open_bytes(tmp_path, raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.offset == offset
    assert str(offset) in str(caught.value) and "model.gguf" in str(caught.value)
    assert peak < 1 << 20, "memory beyond the file's own header"


def test_truncation_at_every_byte_of_the_header(tmp_path):
    draft = Draft(
        pairs=[ARCHITECTURE, ("n", scalar(UINT64, 7)), ("t", array(STRING, ["a", "bc"])), ("x", array(UINT32, [1, 2]))],
        tensors=[("a", [32], 0, 0), ("b", [32, 2], 2, 128)],
    )
    raw = draft.build()
    needed = draft.places["data"] + 128 + 36
    for length in range(needed):
        with pytest.raises(CorruptModelError) as caught:
            open_bytes(tmp_path, raw[:length])
        assert 0 <= caught.value.offset <= length
    with open_bytes(tmp_path, raw[:needed]) as file:
        assert file.data("b").size == 36


@pytest.mark.parametrize(
    "version, what",
    [(1, "GGUF version 1"), (4, "GGUF version 4"), (3 << 24, "big-endian"), (2 << 24, "big-endian")],
)
def test_versions_that_are_not_read(tmp_path, version, what):
    with pytest.raises(UnsupportedModelError, match=what):
        open_bytes(tmp_path, Draft(version=version).build())


def test_big_endian_file_of_the_official_writer(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "big.gguf"), "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        GGUFFile(tmp_path / "big.gguf")


@pytest.mark.parametrize("number, name", [(10, "Q2_K"), (23, "IQ4_XS"), (26, "I32"), (39, "MXFP4"), (99, "number 99")])
def test_unsupported_tensor_type_is_named(tmp_path, number, name):
    draft = Draft(tensors=[("blk.0.attn_q.weight", [256], number, 0)])
    with pytest.raises(UnsupportedModelError) as caught:
        open_bytes(tmp_path, draft.build())
    message = str(caught.value)
    assert name in message and "blk.0.attn_q.weight" in message and "Q4_K" in message and "llama.cpp" in message
    assert "Q6_K" in caught.value.supported


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError):
        GGUFFile(str(tmp_path / "absent.gguf"))
    with pytest.raises(ModelNotFoundError, match="folder"):
        GGUFFile(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no file name"):
        GGUFFile("a\0b")
    with pytest.raises(ModelNotFoundError, match="leads to no file"):
        GGUFFile(tmp_path / ("a" * 5000))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match="no such file"):
        GGUFFile(tmp_path / "file" / "below.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CorruptModelError, match="empty") as caught:
        GGUFFile(tmp_path / "empty.gguf")
    assert caught.value.offset == 0
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ModelNotFoundError, match="pipe"):
            GGUFFile(tmp_path / "pipe")


def test_values_of_every_type(tmp_path):
    kinds = {0: ("B", 200), 1: ("b", -5), 2: ("H", 60000), 3: ("h", -300), 4: ("I", 2**32 - 1), 5: ("i", -(2**31)),
             6: ("f", 0.5), 10: ("Q", 2**64 - 1), 11: ("q", -(2**63)), 12: ("d", 1e300)}  # fmt: skip
    pairs = [(f"s{k}", u32(k) + struct.pack("<" + c, v)) for k, (c, v) in kinds.items()]
    for k, (code, value) in kinds.items():
        pairs.append((f"a{k}", u32(ARRAY) + u32(k) + u64(3) + 3 * struct.pack("<" + code, value)))
    nested = array(ARRAY, [u32(UINT8) + u64(2) + b"\1\2", u32(STRING) + u64(1) + text("in")])
    pairs += [("yes", scalar(BOOL, 1)), ("bools", array(BOOL, [0, 1])), ("text", scalar(STRING, "Größe"))]
    pairs += [("texts", array(STRING, ["", "ein\0e", "zwei"])), ("none", array(STRING, [])), ("nested", nested)]
    with open_bytes(tmp_path, Draft(pairs=pairs).build()) as file:
        m = file.metadata
        for k, (_, value) in kinds.items():
            assert m[f"s{k}"] == value
            assert m[f"a{k}"].tolist() == [value] * 3 and not m[f"a{k}"].flags.writeable
        assert m["yes"] is True and m["bools"].tolist() == [False, True]
        assert m["text"] == "Größe" and m["texts"] == ["", "ein\0e", "zwei"] and m["none"] == []
        assert m["nested"][0].tolist() == [1, 2] and m["nested"][1] == ["in"]
        assert m.length("texts") == 3 and m.type_name("s4") == "uint32" and m.type_name("texts") == "array"
        assert len(m) == len(pairs) and list(m) == [key for key, _ in pairs] and "absent" not in m


def test_array_content_is_checked_on_access(tmp_path):
    draft = Draft(pairs=[("t", array(STRING, [b"fine", b"not \xff"])), ("b", array(BOOL, [1, 0, 5]))])
    with open_bytes(tmp_path, draft.build()) as file:
        for key, beyond in (("t", 12 + 12 + 8 + 4), ("b", 12 + 2)):
            with pytest.raises(CorruptModelError) as caught:
                file.metadata[key]
            assert caught.value.offset == draft.places[f"value:{key}"] + beyond


def test_strings_longer_than_255_bytes_and_long_scalars(tmp_path):
    texts = ["x" * n for n in (0, 255, 256, 300, 70_000)] + ["é" * 200]
    draft = Draft(pairs=[("t", array(STRING, texts)), ("long", scalar(STRING, "y" * 100_000))])
    with open_bytes(tmp_path, draft.build()) as file:
        assert file.metadata["t"] == texts and file.metadata["long"] == "y" * 100_000


def test_random_string_arrays(tmp_path):
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(30):
        codes = [0, 1, 65, 233, 0x4E2D, 0x1F600]
        texts = ["".join(map(chr, rng.choice(codes, rng.integers(0, 90)))) for _ in range(40)]
        with open_bytes(tmp_path, Draft(pairs=[("t", array(STRING, texts))]).build()) as file:
            assert file.metadata["t"] == texts


def test_tensors_agree_with_the_official_reader(tmp_path):
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"):
        path = write_model(tmp_path / f"{kind}.gguf", types=kind, width=256, ffn=512)
        theirs = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
        with GGUFFile(path) as file:
            assert file.version == 3 and file.file_size == path.stat().st_size
            assert list(file.tensors) == list(theirs)
            for name, info in file.tensors.items():
                assert info.shape == tuple(reversed(theirs[name].shape.tolist()))
                assert (info.type, info.nbytes) == (theirs[name].tensor_type.name, theirs[name].n_bytes)
                assert info.offset == theirs[name].data_offset
                data = file.data(name)
                assert data.dtype == np.uint8 and not data.flags.writeable
                assert data.tobytes() == theirs[name].data.tobytes()


def test_version_2_and_other_alignments(tmp_path):
    draft = Draft(version=2, pairs=[("general.alignment", scalar(UINT32, 256))], alignment=256,
                  tensors=[("a", [32], 0, 0), ("b", [32], 0, 256)])  # fmt: skip
    with open_bytes(tmp_path, draft.build()) as file:
        assert file.version == 2 and file.alignment == 256
        assert file.tensors["a"].offset % 256 == 0 and file.data_start == draft.places["data"]


def test_close_and_release(tmp_path):
    path = write_model(tmp_path / "m.gguf", types="F32", vocab=4000)
    file = GGUFFile(path)
    view = file.data("token_embd.weight")
    before = view.tobytes()
    file.release("token_embd.weight")
    file.release("output_norm.weight")  # shorter than a page
    assert view.tobytes() == before
    tokens = file.metadata["tokenizer.ggml.tokens"]
    file.close()
    file.close()
    assert file.closed and view.tobytes() == before and len(tokens) == 4000
    with pytest.raises(ValueError, match="closed"):
        file.data("token_embd.weight")
    with pytest.raises(ValueError, match="closed"):
        file.metadata["tokenizer.ggml.merges"]
    assert file.metadata["general.architecture"] == "llama"


def test_large_vocabulary_opens_fast(tmp_path):
    """128k tokens and 280k merges, as in Llama 3: bounds with room for a busy machine."""
    tokens = [f"tok{i}" for i in range(128_256)]
    merges = [f"{i} {i + 1}" for i in range(280_000)]
    kinds = array(INT32, [1] * 128_256)
    pairs = [("tokens", array(STRING, tokens)), ("merges", array(STRING, merges)), ("types", kinds)]
    path = tmp_path / "large.gguf"
    path.write_bytes(Draft(pairs=pairs).build())
    opened, read = [], []
    for _ in range(5):
        start = time.perf_counter()
        file = GGUFFile(path)
        opened.append(time.perf_counter() - start)
        assert file.metadata.length("tokens") == len(tokens)
        start = time.perf_counter()
        assert len(file.metadata["tokens"]) == len(tokens)
        read.append(time.perf_counter() - start)
        file.close()
    print(f"open {min(opened) * 1e3:.0f} ms, tokens {min(read) * 1e3:.0f} ms")
    assert min(opened) < 0.15 and min(read) < 0.1


def test_string_limit_counts_all_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_metadata, "MAX_STRINGS", 100)
    draft = Draft(pairs=[("a", array(STRING, ["x"] * 60)), ("b", array(STRING, ["x"] * 41))])
    with pytest.raises(CorruptModelError, match="more than 100 strings") as caught:
        open_bytes(tmp_path, draft.build())
    assert caught.value.offset == draft.places["value:b"] + 4


def test_array_byte_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_metadata, "MAX_ARRAY_BYTES", 1000)
    draft = Draft(pairs=[("a", array(UINT8, [0] * 1001))])
    with pytest.raises(CorruptModelError, match="limit is 1000"):
        open_bytes(tmp_path, draft.build())
    with pytest.raises(CorruptModelError, match="limit is 1000"):
        open_bytes(tmp_path, Draft(pairs=[("a", array(STRING, ["x" * 1001]))]).build())


def test_eager_text_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_metadata, "MAX_EAGER_BYTES", 1000)
    draft = Draft(pairs=[(f"k{i}", scalar(STRING, "x" * 90)) for i in range(20)])
    with pytest.raises(CorruptModelError, match="exceed 1000 bytes") as caught:
        open_bytes(tmp_path, draft.build())
    assert caught.value.offset == draft.places["value:k10"]  # ten pairs of 92 bytes, a key, and 90 bytes too many


def test_factory_vocabulary_survives(tmp_path):
    tokens, merges, kinds = bpe_vocabulary(600)
    with GGUFFile(write_model(tmp_path / "m.gguf", vocab=600)) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == tokens
        assert file.metadata["tokenizer.ggml.merges"] == merges
        assert file.metadata["tokenizer.ggml.token_type"].tolist() == kinds
