"""Token ids to text while they come: only characters that are whole."""
from __future__ import annotations

import codecs

from edge_runtime.tokenizer import Tokenizer


class Detokenizer:
    """Collects one sequence's tokens and hands out text that later tokens cannot change.

    The pieces joined, with `flush`, are `tokenizer.decode` of all ids. start: the ids begin a text; False where they
    continue one, so that a leading space of SentencePiece is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, start: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = start and tokenizer.strips_first_space

    def add(self, token_id: int) -> str:
        """Text made final by this token, often "" in the middle of a character. Bytes that can no longer become a
        character come out as U+FFFD. Raises TokenizerError for an id outside the vocabulary."""
        tokenizer = self._tokenizer
        piece = tokenizer.visible_bytes(token_id) if self._skip_special else tokenizer.token_bytes(token_id)
        if self._strip and piece:
            self._strip = False
            if not tokenizer.is_user_defined(token_id):
                piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else ""."""
        return self._utf8.decode(b"", final=True)
