"""Metadata as files have it, malformed in every way we could think of, and at random."""
from __future__ import annotations

import itertools
import random
import re
import time
from typing import Any

import numpy as np
import pytest

from edge_runtime.bpe import BYTE_TO_CHAR
from edge_runtime.errors import EdgeRuntimeError, TokenizerError
from edge_runtime.tokenizer import Tokenizer
from tests.vocabularies import bpe_metadata, spm_metadata, texts


def test_token_arrays_may_be_bytes_or_numpy() -> None:
    metadata = bpe_metadata("llama-bpe")
    want = Tokenizer.from_metadata(metadata)
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    variants: list[dict[str, Any]] = [
        {"tokens": [t.encode() for t in tokens], "merges": [m.encode() for m in merges]},
        {"tokens": tuple(tokens), "merges": tuple(merges)},
        {"tokens": np.array(tokens), "merges": np.array(merges)},
        {"tokens": np.array(tokens, object), "merges": np.array(merges, object)},
        {"token_type": np.array(metadata["tokenizer.ggml.token_type"], np.uint8)},
    ]
    for overrides in variants:
        got = Tokenizer.from_metadata(bpe_metadata("llama-bpe", **overrides))
        for text in texts(3, 50):
            assert got.encode(text, parse_special=True) == want.encode(text, parse_special=True)


def test_token_bytes_that_are_no_utf8() -> None:
    metadata = spm_metadata()
    metadata["tokenizer.ggml.tokens"] = [t.encode() for t in metadata["tokenizer.ggml.tokens"]]
    metadata["tokenizer.ggml.tokens"][300] = b"\xff\xfe"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.token_bytes(300) == b"\xff\xfe"
    assert tokenizer.decode(tokenizer.encode("the report")) == "the report"
    bpe = bpe_metadata("gpt-2")
    bpe["tokenizer.ggml.tokens"][-1] = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert Tokenizer.from_metadata(bpe).encode("a" * 700_000)  # the bulk encoder leaves such a token out


def test_empty_tokens_get_a_name() -> None:
    metadata = spm_metadata()
    metadata["tokenizer.ggml.tokens"][400] = ""
    assert Tokenizer.from_metadata(metadata).token_text(400) == "[EMPTY_400]"


def test_repeated_merges_count_once() -> None:
    metadata = bpe_metadata("gpt-2")
    want = Tokenizer.from_metadata(metadata)
    merges = metadata["tokenizer.ggml.merges"]
    got = Tokenizer.from_metadata(bpe_metadata("gpt-2", merges=merges + merges[:100]))
    for text in texts(4, 100):
        assert got.encode(text) == want.encode(text)
    assert got.encode("b" * 700_000) == want.encode("b" * 700_000)


def test_unset_ids_are_none() -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata("gpt-2", bos_token_id=0xFFFFFFFF, eos_token_id=-1))
    assert tokenizer.bos_id is None and tokenizer.eos_id is None
    assert Tokenizer.from_metadata(spm_metadata(bos_token_id=None, eos_token_id=None)).bos_id == 1


BAD: list[dict[str, Any]] = [
    {"model": None}, {"model": 5}, {"tokens": None}, {"tokens": []}, {"tokens": 7}, {"tokens": "abc"},
    {"tokens": ["a", 5]}, {"tokens": ["a", "a"]}, {"tokens": np.zeros((2, 2))}, {"tokens": np.arange(5)},
    {"merges": None}, {"merges": 5}, {"merges": [5]}, {"merges": ["a"]}, {"merges": ["a b c"]}, {"merges": ["a  b"]},
    {"merges": [" a"]}, {"merges": ["a "]}, {"merges": [""]}, {"merges": ["a nosuch"]}, {"merges": ["nosuch a"]},
    {"merges": ["q ☃"]}, {"merges": ["Q Q", "Q\nQ Q"]}, {"token_type": [1, 2]}, {"token_type": "x"},
    {"token_type": [[1]]}, {"token_type": 1}, {"scores": [1.0]}, {"scores": ["x"] * 4012},
    {"bos_token_id": 10**6}, {"eos_token_id": -5}, {"bos_token_id": "1"}, {"eos_token_id": 1.0}, {"eot_token_id": True},
    {"unknown_token_id": 5000}, {"padding_token_id": [1]}, {"add_bos_token": 1}, {"add_bos_token": "yes"},
    {"add_space_prefix": 0}, {"bos_token_id": None, "add_bos_token": True},
    {"eos_token_id": None, "add_eos_token": True}, {"fim_pad_token_id": 10**7},
]


@pytest.mark.parametrize("overrides", BAD, ids=lambda o: " ".join(f"{k}={str(v)[:20]}" for k, v in o.items()))
def test_malformed_metadata(overrides: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_metadata(bpe_metadata("llama-bpe", **overrides))
    key = next(iter(overrides))
    assert key in str(caught.value) or "vocabulary" in str(caught.value)


def test_wrong_lengths_and_types_of_numbers() -> None:
    n = len(bpe_metadata()["tokenizer.ggml.tokens"])
    for overrides in ({"token_type": [1] * (n - 1)}, {"token_type": [1] * (n + 1)}, {"token_type": [1.0] * n},
                      {"token_type": [-1] * n}, {"token_type": [2**40] * n}, {"scores": [float("nan")] * n},
                      {"scores": [None] * n}, {"token_type": [[1], [1, 2]]}):
        with pytest.raises(TokenizerError):
            Tokenizer.from_metadata(bpe_metadata(**overrides))


def test_the_pre_tokenizer_must_be_a_name() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre"):
        Tokenizer.from_metadata({**bpe_metadata(), "tokenizer.ggml.pre": 7})


@pytest.mark.parametrize("text", ["<0xZZ>", "<0x-1>", "<0x+1>", "<0x 1>", "<0x1>", "abc41", "<0x410>", "<0x41"])
def test_malformed_byte_tokens(text: str) -> None:
    metadata = spm_metadata()
    metadata["tokenizer.ggml.tokens"][10] = text
    tokenizer = Tokenizer.from_metadata(metadata)
    with pytest.raises(TokenizerError, match=re.escape(text)):
        tokenizer.token_bytes(10)


def test_random_damage_raises_our_errors_or_works() -> None:
    seed = 11
    rng = random.Random(seed)
    values: list[Any] = [None, 0, -1, 1, 2**31, 2**64, 1.5, float("nan"), "", "a", b"\xff", [], [1], ["a"], [None], {},
                         True, np.zeros(3), np.array(["a", "b"]), [["a"]], ["a b"], ["\ud800"]]
    for _ in range(400):
        metadata = dict(rng.choice((bpe_metadata(), spm_metadata())))
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(sorted(metadata))
            old = metadata.get(key)
            if isinstance(old, list) and old and rng.random() < 0.5:
                old = list(old)
                for _ in range(rng.randint(1, 5)):
                    old[rng.randrange(len(old))] = rng.choice(values)
                metadata[key] = old
            else:
                metadata[key] = rng.choice(values)
        try:
            tokenizer = Tokenizer.from_metadata(metadata)
            tokenizer.decode(tokenizer.encode("the report 123 <|im_end|> \U0001f600", parse_special=True))
            tokenizer.decode(range(min(tokenizer.vocab_size, 500)), skip_special=False)
        except EdgeRuntimeError:
            pass
        except Exception as e:
            raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e


def test_start_up_time() -> None:
    """128k tokens and 280k merges: this machine takes 0.3 s; the bound leaves room for a slower or busy one."""
    words = ("".join(p) for n in range(2, 7) for p in itertools.product("abcdefg", repeat=n))
    tokens = [*BYTE_TO_CHAR.values(), *words][:128_256]
    merges = [f"{t[:i]} {t[i:]}" for t in tokens[256:] for i in range(1, len(t))][:280_000]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": np.ones(len(tokens), np.int32)}
    start = time.process_time()
    Tokenizer.from_metadata(metadata).encode("Hello")
    assert time.process_time() - start < 1.5
    spm = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
           "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32)}
    start = time.process_time()
    Tokenizer.from_metadata(spm).encode("Hello")
    assert time.process_time() - start < 1.0
