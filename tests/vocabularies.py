"""Small vocabularies trained on text that is generated here, as GGUF metadata, and text to try them on."""
from __future__ import annotations

import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CONTROL, USER_DEFINED, NORMAL, BYTE, UNKNOWN = 3, 4, 1, 6, 2

_LINES = (
    "the report number ist nicht über naïve café año señor être où Straße größer Ελλάδα λόγος привет мир это что",
    "שלום עולם مرحبا العالم नमस्ते दुनिया สวัสดี ไทย 你好 世界 中文 文字 こんにちは カタカナ 한국어 안녕 Việt tiếng",
    "Hello WORLD CamelCase snake_case x1 2024 3.14 1000000 ½ ² ٣ don't I'll we've they're it's YOU'RE 'S İstanbul",
    "ǅ ひらがな … — “quoted” 👍🏽 👩\u200d💻 🇩🇪 def return if",
    "(x==0) {y+=1;} http://a.b/c?d=e&f <b> </b> # ## \\n $5 ^ ~ | ` %",
)
_STEMS = [stem for line in _LINES for stem in line.split()]
_GLUE = ("", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", ", ", ". ", "\u3000", "\xa0", "。")

NASTY = (
    "", " ", "  ", "\n", "\r\n", " \n ", "\t\t", "\n" * 9, " " * 70, " " * 600 + "x", "a" * 500, "ab" * 300, "1" * 50,
    "!" * 40, "\x00", "a\x00b", "\x00\x00", "\x01\x7f\x85", "\u200b\u200d\ufeff", "e\u0301\u0302", "\u0301", "👨‍👩‍👧‍👦",
    "👍🏽👍🏿", "🇩🇪🇫🇷", "\U0010fffd", "\ufffd", "İstanbul ıI", "ſ's 'ſ", "I'M we'Ll 'd 'RE're", "'", "''s", "x'", "'sS",
    "<s>", "</s>", "<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "a<|im_end|>b <|im_end|> c",
    "<tool>x</tool>", "<tool> x </tool>  y", "<0x41>", "<unk>", "▁", "▁▁a ▁", "Ġ", "ĠĊ", "[INST] hi [/INST]",
    "\u3000。\u3000\u3000！", "1 234,567.89", "१२३ ٣٤ Ⅷ ①", "\u2028\u2029", "a\u1680b",
    "-- == ++ <= >= $$ ^^ ~~ || ``", "#include <x.h>\n\tint a[3]={1,2};\r\n", "  leading", "trailing  ",
    "mixed \t \n  \r\n end", "ΑΒΓ αβγ ΣΑΣ", "ǅ ǈ ﬁ ß ẞ",
    "तमिऴ् தமிழ்", "กำแพง", "กรุงเทพมหานคร", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𠀀𠀁", "ﷺ", "\ud7ff\ue000", "½⅓²³", "_a__b_",
    "CamelCaseHTTPServer",
)


def sentences(seed: int, count: int) -> list[str]:
    """Text in many scripts, the same for the same seed."""
    rng = random.Random(seed)
    return ["".join(rng.choice(_STEMS) + rng.choice(_GLUE) for _ in range(rng.randint(3, 14))) for _ in range(count)]


def texts(seed: int, count: int) -> list[str]:
    """`NASTY` and `count` random strings: scripts mixed, assigned characters, ranges that tokenizers cut by."""
    rng = random.Random(seed)
    ranges = ((0, 0x7F), (0, 0x2FF), (0x300, 0x5FF), (0x900, 0x97F), (0x2000, 0x2BFF), (0x3000, 0x30FF),
              (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFE00, 0xFFEF), (0x1F300, 0x1F64F), (0, 0x2FFFF))
    out = list(NASTY)
    while len(out) < count + len(NASTY):
        kind = rng.random()
        if kind < 0.5:
            out += sentences(rng.getrandbits(32), 1)
        else:
            low, high = rng.choice(ranges)
            chars = (chr(rng.randint(low, high)) for _ in range(rng.randint(1, 24)))
            # Tables of llama.cpp, Oniguruma and Python know different Unicode versions.
            text = "".join(c for c in chars if unicodedata.category(c) not in ("Cn", "Cs"))
            out.append(text if kind < 0.8 else rng.choice(NASTY[1:]) + text + rng.choice(NASTY[1:]))
    return out


@cache
def _trained_bpe(size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Only lines are cut, so many merges cross words, and ids depend on every cut that a pre-tokenizer makes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=1, max_token_length=16,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sentences(1, 3000), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return tuple(tokens), tuple(merges)


def bpe_metadata(pre: str | None = "llama-bpe", size: int = 4000, **overrides: Any) -> dict[str, Any]:
    """A byte-level BPE with control tokens and user-defined ones, as a GGUF file's metadata."""
    tokens, merges = _trained_bpe(size)
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"]
    added = ["<tool>", "</tool>", "    ", "ab", "<tool>x"]
    added = [t for t in added if t not in tokens]
    n = len(tokens)
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, *control, *added],
        "tokenizer.ggml.token_type": [NORMAL] * n + [CONTROL] * len(control) + [USER_DEFINED] * len(added),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return _overridden(metadata, overrides)


@cache
def _trained_spm(size: int) -> tuple[str, ...]:
    """Pieces from most to least frequent: characters, and the results of merges over text with ▁ for spaces."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=1, max_token_length=12,
                                  limit_alphabet=400)
    tokenizer.train_from_iterator(sentences(2, 3000), trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    return tuple(t for t in sorted(vocab, key=vocab.__getitem__) if "\n" not in t and "\t" not in t)


def spm_metadata(size: int = 4000, ties: bool = False, **overrides: Any) -> dict[str, Any]:
    """A SentencePiece BPE with byte tokens. ties: many tokens share a score."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces = [*_trained_spm(size), "▁▁", "▁▁▁▁", "zz▁zz", "▁zz", "zz▁", "zz", "z"]
    pieces = list(dict.fromkeys(p for p in pieces if p not in head))
    added = ["<|im_start|>", "<|im_end|>", "<tool>", "</tool>", "[INST]", "[/INST]"]
    kinds = [CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, CONTROL, CONTROL]
    scores = -np.arange(len(pieces), dtype=np.float32)
    if ties:
        scores = np.floor(scores / 50)
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*head, *pieces, *added],
        "tokenizer.ggml.scores": [0.0] * len(head) + scores.tolist() + [-1000.0] * len(added),
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return _overridden(metadata, overrides)


def _overridden(metadata: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` are keys below `tokenizer.ggml.`; None takes a key away."""
    for key, value in overrides.items():
        name = f"tokenizer.ggml.{key}"
        if value is None:
            metadata.pop(name, None)
        else:
            metadata[name] = value
    return metadata


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file that holds a vocabulary and nothing else."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
