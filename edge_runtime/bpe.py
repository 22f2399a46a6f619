"""Byte-level byte-pair encoding, as GPT-2 introduced it: words of bytes, merged by rank."""
from __future__ import annotations

import heapq
import logging
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edge_runtime.pretokenizers import splitter
from edge_runtime.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

log = logging.getLogger(__name__)

# A quadratic scan in C beats a heap in Python below this many symbols; measured on one core.
_SCAN = 96
# Bytes merged here before the `tokenizers` model, which takes 0.6 s to build for 280,000 merges, pays for itself.
_BULK_AFTER = 150_000
_CACHED_WORDS = 1 << 17
_NEVER = 1 << 60


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself where it prints, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (b for b in range(256) if b not in set(printable))
    return {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(rest)}}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class ByteLevelBPE:
    """Encodes text without special tokens; the same ids as llama.cpp's BPE session.

    Words are cut by `tokenizers`. They are merged here until enough text has come to be worth building the
    `tokenizers` model, which merges the same way: lowest rank first, leftmost among equals.
    """

    def __init__(self, vocabulary: Vocabulary):
        assert vocabulary.pre is not None
        self._vocabulary = vocabulary
        self._index = vocabulary.index
        self._spec = vocabulary.pre
        self._words: dict[str, tuple[int, ...]] = {}
        self._merged_bytes = 0
        self._missing = {c for c in BYTE_TO_CHAR.values() if c not in self._index}

    @cached_property
    def _splitter(self) -> Any:
        return splitter(self._spec)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        merges = self._vocabulary.merges
        ranks = dict(zip(merges, range(len(merges))))
        if len(ranks) != len(merges):  # the first of repeated rules counts
            ranks = {}
            for rank, merge in enumerate(merges):
                ranks.setdefault(merge, rank)
        return ranks

    @cached_property
    def _bulk(self) -> HFTokenizer:
        from tokenizers import Tokenizer, models, pre_tokenizers

        # Rust strings hold no surrogates; a token with one is no UTF-8 and no text can spell it.
        vocab = {t: i for t, i in self._index.items() if t.isascii() or not _has_surrogate(t)}
        pairs = (m.partition(" ") for m in self._ranks if m.isascii() or not _has_surrogate(m))
        merges = [(left, right) for left, _, right in pairs]
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=self._spec.ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [self._splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Bytes that the vocabulary has no token for are left out, with a logged warning."""
        if self._missing:
            self._warn_missing(text)
        if self._merged_bytes > _BULK_AFTER or len(text) > 4 * _BULK_AFTER:
            return self._bulk.encode(text, add_special_tokens=False).ids
        words = self._words
        ids: list[int] = []
        for word, _ in self._splitter.pre_tokenize_str(text):
            found = words.get(word)
            if found is None:
                found = self._encode_word(word)
            ids.extend(found)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = "".join(map(BYTE_TO_CHAR.__getitem__, word.encode("utf-8")))
        if len(symbols) > _BULK_AFTER:
            return tuple(t.id for t in self._bulk.model.tokenize(symbols))
        self._merged_bytes += len(symbols)
        found = self._index.get(symbols) if self._spec.ignore_merges else None
        if found is not None:
            ids: tuple[int, ...] = (found,)
        else:
            merge = merge_by_scan if len(symbols) <= _SCAN else merge_by_heap
            index = self._index
            ids = tuple(index[s] for s in merge(symbols, self._ranks) if s in index)
        if len(self._words) >= _CACHED_WORDS:
            self._words.clear()
        if len(word) < 256:
            self._words[word] = ids
        return ids

    def _warn_missing(self, text: str) -> None:
        lost = sorted({CHAR_TO_BYTE[c] for c in self._missing} & set(text.encode("utf-8")))
        if lost:
            log.warning("the vocabulary has no token for byte 0x%02X of the text: it is left out, as in llama.cpp "
                        "(said once)", lost[0])
            self._missing.clear()


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c < "\ue000" for c in text)


def merge_by_scan(symbols: str, ranks: dict[str, int]) -> list[str]:
    """Merges a short word: the best pair is looked for anew after every merge."""
    parts = list(symbols)
    costs = [ranks.get(f"{a} {b}", _NEVER) for a, b in pairwise(parts)]
    while costs:
        best = min(costs)
        if best == _NEVER:
            break
        i = costs.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del costs[i]
        if i:
            costs[i - 1] = ranks.get(f"{parts[i - 1]} {parts[i]}", _NEVER)
        if i < len(costs):
            costs[i] = ranks.get(f"{parts[i]} {parts[i + 1]}", _NEVER)
    return parts


def merge_by_heap(symbols: str, ranks: dict[str, int]) -> list[str]:
    """Merges a word of any length in n log n: candidate pairs in a heap, stale ones skipped."""
    n = len(symbols)
    parts: list[str] = list(symbols)
    following, preceding = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [(rank, i, 2) for i in range(n - 1)
            if (rank := ranks.get(f"{parts[i]} {parts[i + 1]}")) is not None]
    heapq.heapify(heap)
    while heap:
        _, i, size = heapq.heappop(heap)
        j = following[i]
        if not parts[i] or j >= n or len(parts[i]) + len(parts[j]) != size:
            continue
        parts[i] += parts[j]
        parts[j] = ""
        following[i] = following[j]
        if following[j] < n:
            preceding[following[j]] = i
        for a, b in ((preceding[i], i), (i, following[i])):
            if a >= 0 and b < n:
                rank = ranks.get(f"{parts[a]} {parts[b]}")
                if rank is not None:
                    heapq.heappush(heap, (rank, a, len(parts[a]) + len(parts[b])))
    return [p for p in parts if p]
