"""Thousands of damaged files: each opens correctly or raises one of two errors, soon and without much memory."""
from __future__ import annotations

import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from edge_runtime.errors import CorruptModelError, UnsupportedModelError
from edge_runtime.models.config import config_from_gguf, rope_factors
from edge_runtime.models.gguf_file import GGUFFile
from tests.gguf_factory import LLAMA3_ROPE, write_model

FILES_PER_MODEL = 1000
SECONDS_PER_FILE = 2.0  # they take milliseconds; the rest is for a busy machine
BYTES_PER_FILE = 16 << 20
MODELS = {
    "llama": {"architecture": "llama", "types": "Q4_0", "rope": LLAMA3_ROPE, "exit_layers": [1]},
    "qwen2": {"architecture": "qwen2", "types": "Q8_0", "tokenizer": "spm", "rope": {"yarn": {"factor": 4.0}}},
    "qwen3": {"architecture": "qwen3", "types": {"default": "F16", "k": "Q4_1"}, "tied": False},
    "k-quants": {"architecture": "llama", "types": "Q4_K", "width": 256, "ffn": 256, "layers": 1},
}
ABSURD = [0, 1, 2, 5, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def seed_of_today() -> int:
    return int(os.environ.get("EDGE_RUNTIME_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)


def mutate(raw: bytes, header: int, fields: list[int], rng: np.random.Generator) -> tuple[str, bytes]:
    """One damaged copy and what was done. header: bytes before the tensors' data; fields: where whole fields begin."""
    out = bytearray(raw)
    kind = str(rng.choice(["bits", "bytes", "truncate", "length", "splice", "delete", "swap", "field", "zero"]))
    at = int(rng.integers(header))
    match kind:
        case "bits":
            for _ in range(int(rng.integers(1, 9))):
                out[int(rng.integers(header))] ^= 1 << int(rng.integers(8))
        case "bytes":
            count = int(rng.integers(1, 33))
            out[at : at + count] = rng.bytes(count)
        case "truncate":
            at = int(rng.integers(len(raw))) if rng.random() < 0.3 else at
            del out[at:]
        case "length":
            out[at : at + 8] = struct.pack("<Q", ABSURD[int(rng.integers(len(ABSURD)))])
        case "splice":
            start, count = int(rng.integers(header)), int(rng.integers(1, 200))
            out[at:at] = raw[start : start + count]
        case "delete":
            del out[at : at + int(rng.integers(1, 64))]
        case "swap":
            other, count = int(rng.integers(header)), int(rng.integers(1, 64))
            out[at : at + count], out[other : other + count] = raw[other : other + count], raw[at : at + count]
        case "field":
            at = fields[int(rng.integers(len(fields)))]
            value = ABSURD[int(rng.integers(len(ABSURD)))]
            if rng.random() < 0.5:
                out[at : at + 8] = struct.pack("<Q", value)
            elif rng.random() < 0.5:
                out[at : at + 4] = struct.pack("<I", value % 2**32)
            else:
                out[at : at + 4] = struct.pack("<f", float(rng.choice([np.nan, np.inf, -1, 0, 1e38, 1e-38])))
        case "zero":
            out[at : at + int(rng.integers(1, 512))] = bytes(int(rng.integers(1, 512)))
    return kind, bytes(out)


def interesting_fields(file: GGUFFile, raw: bytes) -> list[int]:
    """The header's own fields, every value, and every number of the tensor table."""
    fields = [0, 4, 8, 16]
    for key in file.metadata:
        value = file.metadata.offset(key)
        fields += [value - 4, value, value + 4, value + 12, value - 4 - len(key.encode()) - 8]
    for name in file.tensors:
        at = raw.index(struct.pack("<Q", len(name)) + name.encode())
        table = at + 8 + len(name)
        fields += [at, table, table + 4, table + 12, table + 4 + 8 * len(file.tensors[name].shape)]
    return fields


def use(path) -> str:
    """Everything that the runtime reads from a file before it computes."""
    with GGUFFile(path) as file:
        for info in file.tensors.values():
            assert info.nbytes > 0 and info.offset + info.nbytes <= file.file_size
            view = file.data(info.name)
            assert view.size == info.nbytes
            int(view[0]) + int(view[-1])
            file.release(info.name)
        for key in file.metadata:
            file.metadata[key]
        config = config_from_gguf(file)
        assert config.heads % config.kv_heads == 0 and config.layers >= 1
        rope_factors(file, config)
    return "opened"


@pytest.mark.parametrize("model", MODELS)
def test_damaged_files(tmp_path, model):
    seed = seed_of_today()
    print(f"EDGE_RUNTIME_TEST_SEED={seed}")
    rng = np.random.default_rng([seed, list(MODELS).index(model)])
    sizes = {"width": 32, "heads": 2, "kv_heads": 1, "ffn": 64}
    good = write_model(tmp_path / "good.gguf", **{**sizes, **MODELS[model]})
    raw = good.read_bytes()
    with GGUFFile(good) as file:
        fields, header = interesting_fields(file, raw), file.data_start
    assert use(good) == "opened"
    path = tmp_path / "bad.gguf"
    outcomes: dict[str, int] = {}
    tracemalloc.start()
    try:
        for number in range(FILES_PER_MODEL):
            kind, bad = mutate(raw, header, fields, rng)
            path.unlink(missing_ok=True)
            path.write_bytes(bad)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            start = time.perf_counter()
            try:
                outcome = use(path)
            except CorruptModelError as error:
                assert 0 <= error.offset <= len(bad) and error.reason
                outcome = "corrupt"
            except UnsupportedModelError as error:
                assert error.what
                outcome = "unsupported"
            except Exception as error:
                raise AssertionError(f"seed {seed}, file {number} ({kind}): {type(error).__name__}: {error}") from error
            seconds, memory = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] - before
            assert seconds < SECONDS_PER_FILE, f"seed {seed}, file {number} ({kind}) took {seconds:.1f} s"
            assert memory < BYTES_PER_FILE, f"seed {seed}, file {number} ({kind}) took {memory} bytes"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    finally:
        tracemalloc.stop()
    print(outcomes)
    assert outcomes["corrupt"] > FILES_PER_MODEL / 4 and outcomes.get("opened", 0) > 0


def test_every_byte_of_a_small_header_set_to_extremes(tmp_path):
    """Exhaustive where chance is not: each header byte to 0, 255 and with its top bit flipped."""
    good = write_model(tmp_path / "good.gguf", layers=1, width=32, heads=1, kv_heads=1, ffn=32, vocab=8, tokenizer=None)
    raw = good.read_bytes()
    with GGUFFile(good) as file:
        header = file.data_start
    path = tmp_path / "bad.gguf"
    corrupt = 0
    for at in range(header):
        for value in {0, 255, raw[at] ^ 0x80} - {raw[at]}:
            path.unlink(missing_ok=True)
            path.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
            try:
                use(path)
            except (CorruptModelError, UnsupportedModelError):
                corrupt += 1
    assert corrupt > header
