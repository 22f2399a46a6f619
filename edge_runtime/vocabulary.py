"""The tokens of a model file and what its `tokenizer.ggml.*` metadata says of them, checked."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.errors import TokenizerError, UnsupportedModelError
from edge_runtime.pretokenizers import PreTokenizerSpec, pre_tokenizer_spec

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType; 0 and others: undefined

# Texts by which llama.cpp knows tokens that end a reply or mark fill-in-the-middle where the metadata names none.
_EOG_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[")
_FIM_EOG_TEXTS = (("fim_pad", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
                  ("fim_rep", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
                  ("fim_sep", ("<|file_sep|>",)))
_FIM_TEXTS = (
    ("fim_pre", ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                 "<|code_prefix|>", "<|prefix|>")),
    ("fim_suf", ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                 "<|code_suffix|>", "<|suffix|>")),
    ("fim_mid", ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                 "<|code_middle|>", "<|middle|>")))
_RENDERED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss: part of the visible text


@dataclass(frozen=True)
class Vocabulary:
    """tokens: text of every id (bytes that are no UTF-8 as surrogate escapes); index: text -> id; types: int32 [V] of
    gguf.TokenType; scores: float32 [V], zero where the file has none; merges: "left right", best first; an id that
    the file does not name is None."""

    model: str
    tokens: list[str]
    index: dict[str, int]
    types: np.ndarray
    scores: np.ndarray
    merges: list[str]
    pre: PreTokenizerSpec | None
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    unk_id: int | None
    pad_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strip_after_special: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Reads and checks `tokenizer.ggml.*`.

        Raises TokenizerError where a value is missing, of the wrong type or out of range, UnsupportedModelError for a
        tokenizer or pre-tokenizer that this runtime does not know.
        """
        model = _text(metadata, "model")
        if model is None:
            raise TokenizerError(f"{PREFIX}model is missing: the file carries no tokenizer. Export it again with one.")
        if model not in ("gpt2", "llama"):
            raise UnsupportedModelError(f"tokenizer type {model!r}", ("gpt2", "llama"))
        spm = model == "llama"
        pre = None if spm else pre_tokenizer_spec(_text(metadata, "pre"))
        tokens = _strings(metadata, "tokens")
        if not tokens:
            raise TokenizerError(f"{PREFIX}tokens is empty. Export the file again.")
        if not all(tokens):
            tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
        index = dict(zip(tokens, range(len(tokens))))
        if len(index) != len(tokens):
            i = next(i for i, t in enumerate(tokens) if index[t] != i)
            raise TokenizerError(f"token {tokens[i]!r} stands twice in the vocabulary, as ids {i} and "
                                 f"{index[tokens[i]]}. Export the file again.")
        types = _numbers(metadata, "token_type", len(tokens), np.int32, NORMAL).copy()
        scores = _numbers(metadata, "scores", len(tokens), np.float32, 0)
        merges = [] if spm else _merges(metadata, index)

        ids = {name: _id(metadata, f"{name}_token_id", len(tokens))
               for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
        if spm:
            for name, default in (("bos", 1), ("eos", 2), ("unknown", 0)):
                if ids[name] is None and default < len(tokens):
                    ids[name] = default
        add_bos, add_eos = _flag(metadata, "add_bos_token"), _flag(metadata, "add_eos_token")
        for flag, name in ((add_bos, "bos"), (add_eos, "eos")):
            if flag and ids[name] is None:
                raise TokenizerError(f"{PREFIX}add_{name}_token is true, but {PREFIX}{name}_token_id is not set.")
        if add_bos is None:
            add_bos = (spm or (pre is not None and pre.add_bos)) and ids["bos"] is not None
        add_space_prefix = _flag(metadata, "add_space_prefix")
        eog = _mark_special(metadata, index, types, ids)
        title = metadata.get("general.name")
        return cls(
            model=model, tokens=tokens, index=index, types=types, scores=scores, merges=merges, pre=pre,
            bos_id=ids["bos"], eos_id=ids["eos"], eot_id=ids["eot"], eom_id=ids["eom"], unk_id=ids["unknown"],
            pad_id=ids["padding"], eog_ids=eog, add_bos=add_bos, add_eos=bool(add_eos),
            add_space_prefix=spm if add_space_prefix is None else add_space_prefix,
            # Phi-3's tokenizer eats the whitespace behind its markers; llama.cpp knows it by the model's name.
            strip_after_special=isinstance(title, str) and any(p in title.lower() for p in ("phi-3", "phi3")))


def _mark_special(metadata: Mapping[str, Any], index: dict[str, int], types: np.ndarray,
                  ids: Mapping[str, int | None]) -> frozenset[int]:
    """The ids that end generation. Marks in `types` the tokens that llama.cpp makes control tokens by their text."""
    eog: set[int] = set()
    for texts, ends in ((_FIM_TEXTS, False), (_FIM_EOG_TEXTS, True)):
        for name, candidates in texts:
            found = _id(metadata, f"{name}_token_id", len(types))
            if found is None:
                found = next((index[t] for t in candidates if t in index), None)
                if found is not None:
                    types[found] = CONTROL
            if ends and found is not None:
                eog.add(found)
    for text in _EOG_TEXTS:
        if text in index:
            eog.add(index[text])
            types[index[text]] = CONTROL
    for text in _RENDERED:
        if text in index:
            types[index[text]] = USER_DEFINED
    eog.update(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None)
    ends_by = {t for t in _EOG_TEXTS if index.get(t) in eog}
    calls = ends_by & {"<|call|>", "<|calls|>"}
    if "<|end|>" in ends_by and calls and ends_by & {"<|return|>", "<|flush|>"}:  # it ends a message, not the reply
        eog.discard(index["<|end|>"])
        types[index["<|end|>"]] = USER_DEFINED
    if {"<|tool_response>", "</s>"} <= ends_by:
        eog.discard(index["</s>"])
        types[index["</s>"]] = NORMAL
    return frozenset(eog)


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(PREFIX + key)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{PREFIX}{key} is {type(value).__name__}, must be a string. Export the file again.")
    return value


def _flag(metadata: Mapping[str, Any], key: str) -> bool | None:
    value = metadata.get(PREFIX + key)
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    raise TokenizerError(f"{PREFIX}{key} is {value!r}, must be true or false. Export the file again.")


def _id(metadata: Mapping[str, Any], key: str, limit: int) -> int | None:
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TokenizerError(f"{PREFIX}{key} is {value!r}, must be an integer. Export the file again.")
    if value in (-1, 0xFFFFFFFF):  # llama.cpp's "no such token"
        return None
    if not 0 <= value < limit:
        raise TokenizerError(f"{PREFIX}{key} is {value}, the vocabulary has ids 0 to {limit - 1}. "
                             f"Export the file again.")
    return int(value)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(PREFIX + key)
    if value is None:
        raise TokenizerError(f"{PREFIX}{key} is missing: the tokenizer is incomplete. Export the file again.")
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim == 1 else None
    if not isinstance(value, (list, tuple)):
        raise TokenizerError(f"{PREFIX}{key} must be an array of strings. Export the file again.")
    kinds = set(map(type, value))
    if kinds <= {str}:
        return value if isinstance(value, list) else list(value)
    if kinds <= {str, bytes}:
        return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in value]
    if all(issubclass(k, str) for k in kinds):
        return [str(v) for v in value]
    i, v = next((i, v) for i, v in enumerate(value) if not isinstance(v, (str, bytes)))
    raise TokenizerError(f"{PREFIX}{key}[{i}] is {type(v).__name__}, must be a string. Export the file again.")


def _numbers(metadata: Mapping[str, Any], key: str, length: int, dtype: type, default: int) -> np.ndarray:
    value = metadata.get(PREFIX + key)
    if value is None:
        return np.full(length, default, dtype)
    if not isinstance(value, (np.ndarray, Sequence)) or isinstance(value, (str, bytes)):
        raise TokenizerError(f"{PREFIX}{key} must be an array of numbers. Export the file again.")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in ("iu" if dtype is np.int32 else "iuf"):
        raise TokenizerError(f"{PREFIX}{key} must be a flat array of "
                             f"{'integers' if dtype is np.int32 else 'numbers'}. Export the file again.")
    if len(array) != length:
        raise TokenizerError(f"{PREFIX}{key} has {len(array)} entries for {length} tokens. Export the file again.")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise TokenizerError(f"{PREFIX}{key}[{int(np.isnan(array).argmax())}] is not a number. "
                             f"Export the file again.")
    if dtype is np.int32 and (array.min() < 0 or array.max() > 2**31 - 1):
        raise TokenizerError(f"{PREFIX}{key} holds a value that is no token type. Export the file again.")
    return array.astype(dtype)


def _merges(metadata: Mapping[str, Any], index: dict[str, int]) -> list[str]:
    """The merge rules, each checked to join two known tokens into a known one."""
    merges = _strings(metadata, "merges")
    if not merges:
        return merges
    # Whole-list calls: a loop over 280,000 rules would be half of the start-up time.
    known = index.keys()
    lines = "\n".join(merges)
    results = lines.replace(" ", "").split("\n")
    if (lines.count(" ") == len(merges) == len(results) and known >= set(" ".join(merges).split(" "))
            and all(map(index.__contains__, results))):
        return merges
    for i, merge in enumerate(merges):
        pair = merge.split(" ")
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(f"{PREFIX}merges[{i}] is {merge!r}, must be two tokens with one space between. "
                                 f"Export the file again.")
        for token in (*pair, "".join(pair)):
            if token not in index:
                raise TokenizerError(f"{PREFIX}merges[{i}] {merge!r} needs token {token!r}, which the vocabulary "
                                     f"lacks. Export the file again.")
    return merges
