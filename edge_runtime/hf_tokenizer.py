"""`tokenizer.json` and its companions of a Hugging Face folder as the `tokenizer.*` metadata of a GGUF file.

A GGUF file names how words are cut (`tokenizer.ggml.pre`); a tokenizer.json spells it out. The name is found as
llama.cpp's converter finds it, by what the tokenizer does to a text that sets the families apart, and the whole
tokenizer is then compared with ours on that text: what would give other tokens is refused.
"""
from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from edge_runtime.models.safetensors_file import read_json
from edge_runtime.pretokenizers import PRE_TOKENIZERS, PreTokenizerSpec, splitter
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.vocabulary import BYTE, CONTROL, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

# Contractions in every case, runs of digits and of spaces, letters of both cases and of none, combining marks,
# punctuation and symbols with spaces and line ends around them, scripts that some families single out.
CHECK_TEXT = (
    "Hello World, I'm HERE and we'Ve, she'LL, it's 'tis 'RE D'accord o'clock YOU'D\n"
    "1 12 123 1234 12345 1234567 3.14 v2.0 ١٢٣٤ Ⅷ½ a1b22c333 0xFF\n\n\n \t\n  indented\t\ttabs   \r\n\r\n  end  \n"
    "camelCase HTTPServer McDonald ÉCOLE éÉè naïve Straße ΑΒΓ αβγ Привет МИР i̇ e\u0301e\u0301 ñandú\n"
    "!!! ... ?!?! --- === /* // path/to/file.txt\n</tag> <a href=\"x\">$5 + €7 = £12 ^~| `code` ``` \"quoted\" (x)\n"
    "   three     five          ten                     twenty-one      \n            twelve {z}\n"
    "=== //\n/ a/\n_under_score_ @user #tag 50% a+b=c <=> \\n ' \" ''s \u2018quotes\u2019 \u201cmore\u201d\n"
    "你好，世界。漢字カタカナひらがな 한국어 조합 สวัสดี नमस्ते कि हिन्दी עברית العربية 。、！\n"
    "😀 👩\u200d👩\u200d👧 🏳️\u200d🌈 \u00a0nbsp\u3000wide\u2028line ™ © ² ﬁ Ａ１"
)


_ALIASES = ("llama3", "llama-v3", "llama-bpe")  # one family; the last is what converters write


def tokenizer_metadata(folder: Path, vocab_size: int, bos_id: int | None = None,
                       eos_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """The metadata `tokenizer.*` of the folder's tokenizer, whose tokens are filled up to `vocab_size`.

    bos_id, eos_ids: those that the model's config names, used where the tokenizer's own config is silent.
    ModelNotFoundError: no tokenizer.json. CorruptModelError: it cannot be read. UnsupportedModelError: a kind of
    tokenizer, or a way to cut words, that is not known here.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise UnsupportedModelError("a tokenizer.model without a tokenizer.json", ("tokenizer.json",),
                                        "Save the tokenizer again with a fast tokenizer's save_pretrained.")
        raise ModelNotFoundError(folder, "the folder holds no tokenizer.json")
    values, their = read_json(path), _load(path)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    model = values.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else model
        raise UnsupportedModelError(f"a tokenizer of type {kind!r:.40}", ("BPE",))
    spm = bool(model.get("byte_fallback"))
    tokens, types = _tokens(path, values, vocab_size, spm)
    pairs: dict[str, Any] = {PREFIX + "model": "llama" if spm else "gpt2"}
    merges = _merges(path, model.get("merges", []))
    if spm:
        pairs[PREFIX + "scores"] = np.array(_scores(tokens, merges), np.float32)
        pairs[PREFIX + "add_space_prefix"] = _starts_with_space(their)
    else:
        pairs |= {PREFIX + "pre": _pre_tokenizer(values, their), PREFIX + "merges": merges}
    pairs |= {PREFIX + "tokens": tokens, PREFIX + "token_type": np.array(types, np.int32)}
    pairs |= _special_ids(config, tokens, bos_id, eos_ids, spm)
    pairs |= _added(config, their, pairs)
    template = _chat_template(folder, config)
    if template:
        pairs["tokenizer.chat_template"] = template
    _compare(their, pairs)
    return pairs


def _load(path: Path) -> HFTokenizer:
    from tokenizers import Tokenizer as HFTokenizer

    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptModelError(path, 0, f"no tokenizer ({error})") from error


def _tokens(path: Path, values: Mapping[str, Any], vocab_size: int, spm: bool) -> tuple[list[str], list[int]]:
    """Texts and GGUF types of all ids."""
    found: dict[int, tuple[str, int]] = {}
    unknown = values["model"].get("unk_token")
    for text, number in values["model"].get("vocab", {}).items():
        byte = spm and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        found[number] = (text, BYTE if byte else UNKNOWN if spm and text == unknown else NORMAL)
    for entry in values.get("added_tokens") or []:
        text, number = entry["content"], entry["id"]
        kind = CONTROL if entry.get("special") else USER_DEFINED
        found[number] = (text, UNKNOWN if spm and text == unknown else kind)
    most = max(found, default=-1)
    if most >= vocab_size:
        raise CorruptModelError(path, 0, f"token id {most} lies outside the model's vocabulary of {vocab_size}")
    rows = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _merges(path: Path, merges: Any) -> list[str]:
    """Newer files hold pairs, older ones texts with a space between."""
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if any(pair.count(" ") != 1 for pair in pairs):
        raise CorruptModelError(path, 0, "a merge that is not two tokens")
    return pairs


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges what gives the piece of the best score; where only merges are known, of the earliest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def _starts_with_space(their: HFTokenizer) -> bool:
    ids = their.encode("a", add_special_tokens=False).ids
    return bool(ids) and str(their.id_to_token(ids[0])).startswith("▁")


def _pre_tokenizer(values: Mapping[str, Any], their: HFTokenizer) -> str:
    """The name under which GGUF files know how this tokenizer cuts words."""
    normalizer = values.get("normalizer")
    if normalizer is not None and not _harmless(normalizer):
        raise UnsupportedModelError(f"the normalizer {json.dumps(normalizer):.80}", ("none", "NFC"))
    told = values.get("pre_tokenizer")
    if "ByteLevel" not in json.dumps(told):
        raise UnsupportedModelError(f"the pre-tokenizer {json.dumps(told):.120}", ("byte-level ones",))
    cut = [where for _, where in their.pre_tokenizer.pre_tokenize_str(CHECK_TEXT)]
    whole = bool(values["model"].get("ignore_merges"))
    names = ("llama-bpe", *(name for name in PRE_TOKENIZERS if name not in ("default", *_ALIASES)))
    same = [name for name in names if words(name) == cut]
    for name in same:
        if PRE_TOKENIZERS[name].ignore_merges == whole:
            return name
    if same:  # the same words; whether a whole word skips the merges matters only where the merges do not lead to it
        return same[0]
    raise UnsupportedModelError(f"the pre-tokenizer {json.dumps(told):.300}", sorted(PRE_TOKENIZERS),
                                "It cuts words as none of them does.")


def words(pre: str) -> list[tuple[int, int]]:
    """Where the rules that `tokenizer.ggml.pre` names cut CHECK_TEXT."""
    return list(_words_of(PRE_TOKENIZERS[pre]))


@cache
def _words_of(spec: PreTokenizerSpec) -> tuple[tuple[int, int], ...]:
    return tuple(where for _, where in splitter(spec).pre_tokenize_str(CHECK_TEXT))


def _harmless(normalizer: Mapping[str, Any]) -> bool:
    """NFC leaves composed text alone; GGUF's readers never normalize."""
    if normalizer.get("type") == "Sequence":
        return all(_harmless(part) for part in normalizer.get("normalizers", []))
    return normalizer.get("type") == "NFC"


def _special_ids(config: Mapping[str, Any], tokens: list[str], bos_id: int | None, eos_ids: tuple[int, ...],
                 spm: bool) -> dict[str, Any]:
    index = {text: number for number, text in enumerate(tokens)}

    def named(key: str, fallback: int | None) -> int | None:
        value = config.get(key)
        text = value.get("content") if isinstance(value, Mapping) else value
        found = index.get(text) if isinstance(text, str) else None
        return found if found is not None else fallback

    found = {"bos": named("bos_token", bos_id), "eos": named("eos_token", eos_ids[0] if eos_ids else None),
             "unknown": named("unk_token", None), "padding": named("pad_token", None)}
    if spm:  # what SentencePiece's own files hold where nothing else is said
        for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>")):
            found[name] = index.get(text) if found[name] is None else found[name]
    others = [number for number in eos_ids if number != found["eos"]]
    found["eot"] = others[0] if others else None
    return {f"{PREFIX}{name}_token_id": number for name, number in found.items()
            if number is not None and number < len(tokens)}


def _added(config: Mapping[str, Any], their: HFTokenizer, pairs: Mapping[str, Any]) -> dict[str, bool]:
    """Whether BOS and EOS are written: the tokenizer's config says, or the tokenizer does."""
    ids = their.encode("a", add_special_tokens=True).ids
    found = {}
    for name, at in (("bos", 0), ("eos", -1)):
        told, number = config.get(f"add_{name}_token"), pairs.get(f"{PREFIX}{name}_token_id")
        does = bool(ids) and number is not None and ids[at] == number
        found[f"{PREFIX}add_{name}_token"] = (told if isinstance(told, bool) else does) and number is not None
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compare(their: HFTokenizer, pairs: Mapping[str, Any]) -> None:
    """UnsupportedModelError where our tokenizer, made from the metadata, gives other tokens than the folder's."""
    ours = Tokenizer.from_metadata(pairs)
    for text in (unicodedata.normalize("NFC", CHECK_TEXT), "a", " a", "The quick brown fox.\n\nIt's 2024!"):
        mine, wanted = ours.encode(text, add_special=False), their.encode(text, add_special_tokens=False).ids
        if mine != wanted:
            at = next((i for i, (a, b) in enumerate(zip(mine, wanted)) if a != b), min(len(mine), len(wanted)))
            rules = pairs.get(PREFIX + "pre", "SentencePiece")
            raise UnsupportedModelError(f"a tokenizer that reads {text[:20]!r}... as other tokens than the rules "
                                        f"{rules!r} of GGUF files (token {at}: {wanted[at:at + 3]}, {mine[at:at + 3]})")
