"""Ids, pieces and end-of-generation ids against llama.cpp's own tokenizer, on vocabularies made here."""
from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.models.llama_cpp_bindings import bindings
from edge_runtime.pretokenizers import PRE_TOKENIZERS
from edge_runtime.tokenizer import Tokenizer
from tests.vocabularies import bpe_metadata, spm_metadata, texts, write_gguf

pytestmark = pytest.mark.peers
llama_cpp = bindings()

SEED = 20240917


class Peer:
    """llama.cpp's tokenizer of one file."""

    def __init__(self, path: Path):
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp refuses {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        limit = len(data) + 8
        ids = (llama_cpp.llama_token * limit)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, limit, add_special, parse_special)
        assert count >= 0
        return list(ids[:count])

    def piece(self, token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(self.vocab, token_id, buffer, 256, 0, True)
        assert size >= 0
        return buffer.raw[:size]

    def eog_ids(self) -> set[int]:
        count = llama_cpp.llama_vocab_n_tokens(self.vocab)
        return {i for i in range(count) if llama_cpp.llama_vocab_is_eog(self.vocab, i)}

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)


def check(tmp_path: Path, metadata: dict[str, Any], seed: int, count: int) -> None:
    peer, ours = Peer(write_gguf(tmp_path / "vocab.gguf", metadata)), Tokenizer.from_metadata(metadata)
    try:
        for text in texts(seed, count):
            for add_special, parse_special in ((True, False), (False, True)):
                want, got = peer.encode(text, add_special, parse_special), ours.encode(text, add_special, parse_special)
                assert got == want, (f"seed {seed}: {text!r} parse_special={parse_special}: llama.cpp "
                                     f"{[ours.token_text(i) for i in want]}, here {[ours.token_text(i) for i in got]}")
        for i in range(ours.vocab_size):
            assert ours.token_bytes(i) == peer.piece(i), (i, ours.token_text(i))
        assert ours.eog_ids == peer.eog_ids()
    finally:
        peer.close()


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_bpe(tmp_path: Path, pre: str) -> None:
    check(tmp_path, bpe_metadata(pre), SEED, 400)


def test_byte_level_bpe_without_a_pre_tokenizer(tmp_path: Path) -> None:
    check(tmp_path, bpe_metadata(None), SEED + 1, 400)


@pytest.mark.parametrize("overrides", [
    {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}, {"eot_token_id": 4002}])
def test_byte_level_bpe_flags(tmp_path: Path, overrides: dict[str, Any]) -> None:
    check(tmp_path, bpe_metadata("qwen2", **overrides), SEED + 2, 100)


def test_bytes_without_a_token_are_left_out(tmp_path: Path) -> None:
    metadata = bpe_metadata("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    for lost in ("Ā", "ā"):  # bytes 0 and 1
        tokens[tokens.index(lost)] = f"<lost{ord(lost)}>"
    metadata["tokenizer.ggml.merges"] = [m for m in metadata["tokenizer.ggml.merges"] if not {"Ā", "ā"} & set(m)]
    check(tmp_path, metadata, SEED + 3, 200)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("overrides", [
    {}, {"add_space_prefix": False}, {"add_bos_token": False, "add_eos_token": True}])
def test_sentencepiece(tmp_path: Path, ties: bool, overrides: dict[str, Any]) -> None:
    check(tmp_path, spm_metadata(ties=ties, **overrides), SEED + 4, 1000)


def test_sentencepiece_decoding(tmp_path: Path) -> None:
    metadata = spm_metadata()
    peer, ours = Peer(write_gguf(tmp_path / "vocab.gguf", metadata)), Tokenizer.from_metadata(metadata)
    for text in texts(SEED + 5, 300):
        ids = ours.encode(text, add_special=False)
        array = (llama_cpp.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(8 * len(text.encode()) + 16)
        size = llama_cpp.llama_detokenize(peer.vocab, array, len(ids), buffer, len(buffer), False, False)
        assert ours.decode_bytes(ids) == buffer.raw[:size], text
    peer.close()
