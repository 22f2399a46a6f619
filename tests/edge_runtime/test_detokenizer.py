"""Incremental detokenization: whole characters only, and the same text as decoding at once."""
from __future__ import annotations

import random

import pytest

from edge_runtime.bpe import BYTE_TO_CHAR
from edge_runtime.detokenizer import Detokenizer
from edge_runtime.errors import TokenizerError
from edge_runtime.tokenizer import Tokenizer
from tests.vocabularies import bpe_metadata, spm_metadata, texts

SEED = 23


@pytest.fixture(scope="module", params=["bpe", "spm", "spm without prefix"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bpe":
        return Tokenizer.from_metadata(bpe_metadata("qwen2"))
    return Tokenizer.from_metadata(spm_metadata(add_space_prefix=request.param == "spm"))


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


def test_pieces_join_to_the_text(tokenizer: Tokenizer) -> None:
    for text in texts(SEED, 300):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids), f"seed {SEED}: {text!r}"
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_random_ids(tokenizer: Tokenizer, skip_special: bool, start: bool) -> None:
    rng = random.Random(SEED)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size if rng.random() < 0.5 else 260) for _ in range(rng.randint(0, 30))]
        joined = "".join(stream(tokenizer, ids, skip_special=skip_special, start=start))
        assert joined == tokenizer.decode(ids, skip_special, start=start), f"seed {SEED}: {ids}"


def test_what_was_handed_out_stays(tokenizer: Tokenizer) -> None:
    rng = random.Random(SEED)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(12)]
        detokenizer, text = Detokenizer(tokenizer), ""
        for i, token_id in enumerate(ids):
            text += detokenizer.add(token_id)
            # The rest is at most one unfinished character, which decoding at once shows as U+FFFD.
            whole = tokenizer.decode(ids[:i + 1])
            assert whole.startswith(text) and whole[len(text):] in ("", "\ufffd")


def test_a_character_in_four_tokens() -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata("gpt-2"))
    ids = [tokenizer.vocabulary.index[BYTE_TO_CHAR[b]] for b in "a😀".encode()]
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", ""]
    assert stream(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]
    assert stream(tokenizer, [*ids[:3], ids[0]]) == ["a", "", "", "\ufffda", ""]


def test_the_first_space_of_sentencepiece() -> None:
    tokenizer = Tokenizer.from_metadata(spm_metadata())
    bos = tokenizer.bos_id
    assert bos is not None
    ids = tokenizer.encode("the report")
    assert ids[0] == bos
    assert "".join(stream(tokenizer, ids)) == "the report"
    assert "".join(stream(tokenizer, ids[1:], start=False)) == " the report"


def test_unknown_ids(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    with pytest.raises(TokenizerError, match=str(tokenizer.vocab_size - 1)):
        detokenizer.add(tokenizer.vocab_size)
    assert detokenizer.add(300) is not None  # and goes on
