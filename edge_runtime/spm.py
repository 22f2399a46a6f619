"""SentencePiece's byte-pair encoding as llama.cpp runs it: the adjacent pair whose union scores best merges first."""
from __future__ import annotations

import heapq
from functools import cached_property

import numpy as np

from edge_runtime.errors import TokenizerError
from edge_runtime.vocabulary import Vocabulary

SPACE = "▁"  # U+2581 stands for a space inside tokens
_CACHED_PIECES = 1 << 17


class ScoredBPE:
    """Encodes text without special tokens. Ties in score go to the leftmost pair; a character that no token spells
    becomes its UTF-8 bytes' tokens `<0x00>` to `<0xFF>`, or the unknown token where the vocabulary lacks those."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._index = vocabulary.index
        self._pieces: dict[str, tuple[int, ...]] = {}

    @cached_property
    def _scores(self) -> list[float]:
        return self._vocabulary.scores.tolist()

    @cached_property
    def _joints(self) -> np.ndarray:
        """Sorted uint64 codes of all pairs of neighbouring characters inside tokens. Where two characters of a text
        are no such pair, no merge can ever cross, so the text may be cut there without changing its ids."""
        codes = _codepoints("\0".join(t for t in self._vocabulary.tokens if len(t) > 1))
        pairs = codes[:-1] << np.uint64(32) | codes[1:]
        return np.unique(pairs)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which spaces are spaces."""
        text = text.replace(" ", SPACE)
        if not text:
            return []
        codes = _codepoints(text)
        pairs = codes[:-1] << np.uint64(32) | codes[1:]
        joints = self._joints
        if len(joints):
            at = np.minimum(np.searchsorted(joints, pairs), len(joints) - 1)
            cuts = np.flatnonzero(joints[at] != pairs) + 1
        else:
            cuts = np.arange(1, len(text))
        pieces, start = self._pieces, 0
        ids: list[int] = []
        for end in [*cuts.tolist(), len(text)]:
            piece = text[start:end]
            start = end
            found = pieces.get(piece)
            if found is None:
                found = self._encode_piece(piece)
            ids.extend(found)
        return ids

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        index = self._index
        ids: list[int] = []
        for symbol in merge_by_score(piece, index, self._scores):
            found = index.get(symbol)
            if found is None:
                ids.extend(map(self._byte_id, symbol.encode("utf-8")))
            else:
                ids.append(found)
        if len(self._pieces) >= _CACHED_PIECES:
            self._pieces.clear()
        if len(piece) < 256:
            self._pieces[piece] = tuple(ids)
        return tuple(ids)

    def _byte_id(self, byte: int) -> int:
        found = self._index.get(f"<0x{byte:02X}>")
        if found is None:
            found = self._index.get(chr(byte)) if byte < 0x80 else None
        if found is None:
            found = self._vocabulary.unk_id
        if found is None:
            raise TokenizerError(f"the vocabulary has no token for byte 0x{byte:02X} and no unknown token. "
                                 f"Export the file again with byte tokens.")
        return found


def merge_by_score(piece: str, index: dict[str, int], scores: list[float]) -> list[str]:
    """The symbols left when no two neighbours spell a token any more, in n log n."""
    n = len(piece)
    parts: list[str] = list(piece)
    following, preceding = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = []
    for i in range(n - 1):
        token = index.get(parts[i] + parts[i + 1])
        if token is not None:
            heap.append((-scores[token], i, 2))
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
                token = index.get(parts[a] + parts[b])
                if token is not None:
                    heapq.heappush(heap, (-scores[token], a, len(parts[a]) + len(parts[b])))
    return [p for p in parts if p]


def _codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
