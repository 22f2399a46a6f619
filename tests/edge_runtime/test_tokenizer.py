"""Encoding, decoding and special tokens of both tokenizer types, on vocabularies trained here."""
from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from edge_runtime.bpe import BYTE_TO_CHAR, ByteLevelBPE, merge_by_heap, merge_by_scan
from edge_runtime.errors import TokenizerError, UnsupportedModelError
from edge_runtime.pretokenizers import PRE_TOKENIZERS
from edge_runtime.spm import ScoredBPE
from edge_runtime.tokenizer import Tokenizer
from tests.vocabularies import NASTY, bpe_metadata, spm_metadata, texts

SEED = 7


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.from_metadata(bpe_metadata("llama-bpe"))


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    return Tokenizer.from_metadata(spm_metadata())


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_round_trip_of_every_pre_tokenizer(pre: str) -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata(pre))
    for text in texts(SEED, 100):
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"seed {SEED}: {text!r}"


def test_round_trip_of_sentencepiece(spm: Tokenizer) -> None:
    for text in texts(SEED, 500):
        if "▁" in text or "<tool>" in text:  # ▁ is the model's space; user-defined tokens are followed by a space
            continue
        assert spm.decode(spm.encode(text)) == text, f"seed {SEED}: {text!r}"


def test_token_bytes_join_to_the_text(bpe: Tokenizer) -> None:
    for text in NASTY:
        ids = bpe.encode(text, add_special=False)
        assert b"".join(map(bpe.token_bytes, ids)) == text.encode()
        assert bpe.decode_bytes(ids) == text.encode()


def test_bos_and_eos_flags() -> None:
    metadata = bpe_metadata("qwen2")
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    plain = Tokenizer.from_metadata(metadata).encode("Hello")
    assert bos not in plain and eos not in plain
    both = Tokenizer.from_metadata(bpe_metadata("qwen2", add_bos_token=True, add_eos_token=True))
    assert both.encode("Hello") == [bos, *plain, eos]
    assert both.encode("Hello", add_special=False) == plain
    assert both.encode("") == [bos, eos]
    assert Tokenizer.from_metadata(bpe_metadata("llama-bpe")).encode("Hello")[0] == bos
    assert Tokenizer.from_metadata(bpe_metadata("llama-bpe", add_bos_token=False)).encode("") == []
    assert Tokenizer.from_metadata(bpe_metadata("llama-bpe", bos_token_id=None)).encode("") == []


def test_special_tokens_are_parsed_when_asked(bpe: Tokenizer) -> None:
    end = bpe.special_tokens["<|im_end|>"]
    assert bpe.encode("a<|im_end|>b", False, True).count(end) == 1
    assert end not in bpe.encode("a<|im_end|>b", False, False)
    ids = bpe.encode("a<|im_end|>b", False, True)
    assert bpe.decode(ids) == "ab" and bpe.decode(ids, skip_special=False) == "a<|im_end|>b"
    assert bpe.is_special(end) and not bpe.is_special(ids[0])
    assert end in bpe.eog_ids and bpe.eos_id in bpe.eog_ids


def test_user_defined_tokens_are_always_parsed_and_kept(bpe: Tokenizer) -> None:
    tool = next(i for i in range(bpe.vocab_size) if bpe.token_text(i) == "<tool>")
    ids = bpe.encode("x<tool>y", False, False)
    assert tool in ids and not bpe.is_special(tool)
    assert bpe.decode(ids) == "x<tool>y"


def test_the_longest_added_token_wins(bpe: Tokenizer) -> None:
    assert [bpe.token_text(i) for i in bpe.encode("<tool>x<tool>", False)] == ["<tool>x", "<tool>"]


def test_end_of_generation_by_text() -> None:
    metadata = bpe_metadata("qwen2")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert {tokens.index(t) for t in ("</s>", "<|im_end|>", "<|endoftext|>")} == set(tokenizer.eog_ids)
    named = Tokenizer.from_metadata(bpe_metadata("qwen2", eot_token_id=5, eom_token_id=6))
    assert {5, 6} <= named.eog_ids


def test_harmony_message_end_does_not_end_the_reply() -> None:
    metadata = bpe_metadata("gpt-4o")
    metadata["tokenizer.ggml.tokens"] += ["<|end|>", "<|return|>", "<|call|>", "<|channel|>"]
    metadata["tokenizer.ggml.token_type"] += [3] * 4
    tokenizer = Tokenizer.from_metadata(metadata)
    texts_of = {tokenizer.token_text(i) for i in tokenizer.eog_ids}
    assert {"<|return|>", "<|call|>"} <= texts_of and "<|end|>" not in texts_of
    channel = metadata["tokenizer.ggml.tokens"].index("<|channel|>")
    assert tokenizer.decode([channel]) == "<|channel|>"


def test_sentencepiece_prefix_space(spm: Tokenizer) -> None:
    ids = spm.encode("the report", add_special=False)
    assert spm.token_text(ids[0]).startswith("▁")
    assert spm.decode(ids) == "the report"
    assert spm.decode(ids, start=False) == " the report"
    assert spm.decode(spm.encode(" the")) == " the"
    bare = Tokenizer.from_metadata(spm_metadata(add_space_prefix=False))
    assert not bare.token_text(bare.encode("the", add_special=False)[0]).startswith("▁")
    assert bare.decode(bare.encode(" the")) == " the"


def test_sentencepiece_spells_unknown_characters_in_bytes(spm: Tokenizer) -> None:
    ids = spm.encode("\U00010348", add_special=False)
    assert [spm.token_text(i) for i in ids[-4:]] == ["<0xF0>", "<0x90>", "<0x8D>", "<0x88>"]
    assert spm.decode(ids) == "\U00010348"


def test_sentencepiece_without_bytes_uses_the_unknown_token() -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.scores": [0.0, 0, 0, -1, -2, -3], "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1]}
    assert Tokenizer.from_metadata(metadata).encode("ab") == [1, 5, 0]


def test_equal_scores_merge_from_the_left() -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "aa", "aaa"]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * 6,
                "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1], "tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("aaaaaaa", False)] == ["aaa", "aaa", "a"]


def test_sentencepiece_cuts_change_nothing(spm: Tokenizer) -> None:
    """Cutting where no token joins two characters gives what merging the whole text gives."""
    from edge_runtime.spm import merge_by_score

    encoder = ScoredBPE(spm.vocabulary)
    v = spm.vocabulary
    for text in texts(SEED, 300):
        whole = merge_by_score(text.replace(" ", "▁"), v.index, v.scores.tolist())
        want = [i for s in whole for i in ([v.index[s]] if s in v.index else
                                           [v.index[f"<0x{b:02X}>"] for b in s.encode()])]
        assert encoder.encode(text) == want, f"seed {SEED}: {text!r}"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "default", "deepseek-llm", "gpt-2", "tekken"])
def test_bulk_encoding_gives_the_same_ids(pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = bpe_metadata(pre)
    rented, bought = (ByteLevelBPE(Tokenizer.from_metadata(metadata).vocabulary) for _ in range(2))
    bought._merged_bytes = 1 << 40
    for text in texts(SEED, 300):
        assert rented.encode(text) == bought.encode(text), f"seed {SEED}: {text!r}"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "bailingmoe"])
def test_patterns_cut_as_llama_cpp_writes_them(pre: str) -> None:
    """The patterns here never go back over a long run; these are llama.cpp's own words."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    contractions = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    word, tail = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    upper, lower = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
    start = r"[^\r\n\p{L}\p{N}]?"
    own = {
        "llama-bpe": rf"{contractions}|{word}|\p{{N}}{{1,3}}|{tail}",
        "qwen2": rf"{contractions}|{word}|\p{{N}}|{tail}",
        "tekken": rf"{start}{upper}*{lower}+|{start}{upper}+{lower}*|\p{{N}}|{tail.replace('n]*', 'n/]*')}",
        "gpt-4o": (rf"{start}{upper}*{lower}+{contractions}?|{start}{upper}+{lower}*{contractions}?|\p{{N}}{{1,3}}|"
                   + tail.replace("n]*", "n/]*")),
        "deepseek-v3": (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        "bailingmoe": (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|" + word
                       + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
    }[pre]
    want, got = Split(Regex(own), "isolated"), Split(Regex(PRE_TOKENIZERS[pre].patterns[-1]), "isolated")
    rng = random.Random(SEED)
    alphabet = "ABabÉé你ǅ \n\r\t1!'s/\u0301\u3000"
    samples = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 20))) for _ in range(4000)]
    for text in samples + texts(SEED, 200):
        assert got.pre_tokenize_str(text) == want.pre_tokenize_str(text), f"seed {SEED}: {text!r}"


def test_both_merges_agree() -> None:
    rng = random.Random(SEED)
    for _ in range(300):
        pairs = [(rng.choice("abc"), rng.choice("abc")) for _ in range(4)]
        pairs += [(a + b, c) for (a, b), (c, _) in zip(pairs, reversed(pairs))]
        ranks = {f"{a} {b}": rank for rank, (a, b) in enumerate(pairs)}
        word = "".join(rng.choice("abc") for _ in range(rng.randint(1, 40)))
        assert merge_by_scan(word, ranks) == merge_by_heap(word, ranks), f"seed {SEED}: {word} {ranks}"


@pytest.mark.parametrize("unit", ["a", "ab", " ", "\n", "1", "!", "é", "你", "👍", "a\u0301", "x "])
@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_a_megabyte_takes_seconds_not_hours(kind: str, unit: str) -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata("llama-bpe") if kind == "bpe" else spm_metadata(2000))
    took = []
    for size in (100_000, 400_000):
        text = (unit * size)[:size // len(unit.encode())]
        start = time.process_time()
        ids = tokenizer.encode(text)
        took.append(time.process_time() - start)
        assert tokenizer.decode(ids) == text
    assert took[1] < 16 * took[0] + 1, took


@pytest.mark.parametrize("bad", [-1, 10**6, True, 1.5, "a", None])
def test_ids_outside_the_vocabulary(bpe: Tokenizer, bad: object) -> None:
    for call in (bpe.token_bytes, bpe.token_text, bpe.is_special, lambda i: bpe.decode([5, i])):
        if bad is True and call is not bpe.token_text:  # a dict finds 1 under True
            continue
        with pytest.raises(TokenizerError, match=str(bad)):
            call(bad)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=f"0 to {bpe.vocab_size - 1}"):
        bpe.decode([bpe.vocab_size])


def test_ids_may_be_numpy(bpe: Tokenizer) -> None:
    ids = bpe.encode("Hello world")
    assert bpe.decode(np.array(ids, np.int32)) == bpe.decode(iter(ids)) == "Hello world"
    assert bpe.token_bytes(np.int64(ids[1])) == bpe.token_bytes(ids[1])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok\ud83d"])
def test_lone_surrogates(bpe: Tokenizer, spm: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, spm):
        with pytest.raises(TokenizerError, match="surrogate"):
            tokenizer.encode(text)


def test_text_must_be_str(bpe: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="must be str"):
        bpe.encode(b"bytes")  # type: ignore[arg-type]


def test_invalid_utf8_decodes_to_replacement_characters(bpe: Tokenizer) -> None:
    index = bpe.vocabulary.index
    ids = [index[BYTE_TO_CHAR[b]] for b in (0xE4, 0xBD, 0x41, 0xFF)]
    assert bpe.decode(ids) == "\ufffdA\ufffd"


def test_lost_bytes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    metadata = bpe_metadata("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index(BYTE_TO_CHAR[0])] = "<zero>"
    metadata["tokenizer.ggml.merges"] = [m for m in metadata["tokenizer.ggml.merges"] if BYTE_TO_CHAR[0] not in m]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("a\x00b\x00")) == "ab"
    assert [r for r in caplog.records if "0x00" in r.message and "once" in r.message] == caplog.records[:1]


def test_many_threads(bpe: Tokenizer) -> None:
    fresh = Tokenizer.from_metadata(bpe_metadata("llama-bpe"))
    samples = texts(SEED, 200)
    want = [bpe.encode(t) for t in samples]
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = list(range(len(samples)))
        random.Random(seed).shuffle(order)
        wrong.extend(samples[i] for i in order if fresh.encode(samples[i]) != want[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("name", ["kimi-k2", "no-such-thing"])
def test_unknown_pre_tokenizers_are_named(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="llama-bpe") as caught:
        Tokenizer.from_metadata(bpe_metadata(name))
    assert name in str(caught.value)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "no_vocab", ""])
def test_unknown_tokenizers_are_named(model: str) -> None:
    with pytest.raises(UnsupportedModelError, match="gpt2, llama"):
        Tokenizer.from_metadata(bpe_metadata(model=model))
