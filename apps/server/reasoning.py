"""What a model thinks, apart from what it answers: <think>...</think> at the start of a reply, while it is written."""
from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from edge_runtime.apps.server.tool_parser import overlap

if TYPE_CHECKING:
    from edge_runtime.outcome import Chunk, Reply
    from edge_runtime.tokenizer import Tokenizer

Piece = TypeVar("Piece", "Chunk", "Reply")
OPENING, CLOSING = "<think>", "</think>"


class ReasoningParser:
    """Fed with chunks, gives pairs: reasoning that came, and the chunk with what is left as its text.

    opened: the prompt ended inside a thought, so that the reply begins in one. Space around a thought and before the
    answer belongs to neither. Only the thought that a reply begins with is one; one that nothing closes goes to the
    reply's end.
    """

    def __init__(self, opened: bool, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._inside = opened
        self._begin = True  # an opening may still come
        self._lead = False  # only space came since the thought opened, or since it closed
        self._answering = False
        self._held = ""  # may be the beginning of a mark, or space before one

    def push(self, piece: Piece) -> tuple[str, Piece]:
        if self._answering and not self._lead:
            return "", piece
        self._held += piece.text
        reasoning = self._read(piece.finish_reason is not None)
        if not self._answering:
            return reasoning, replace(piece, text="", token_ids=())
        text = self._held.lstrip() if self._lead else self._held
        self._lead, self._held = self._lead and not text, ""
        return reasoning, replace(piece, text=text, token_ids=self._behind(piece.token_ids, text))

    def _read(self, last: bool) -> str:
        """The thought as far as it is certain; what follows it is left in `_held`."""
        if self._begin and not self._opening(last):
            return ""
        if not self._inside:
            return ""
        if self._lead:
            self._held = self._held.lstrip()
        at = self._held.find(CLOSING)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(CLOSING):]
            self._inside, self._answering, self._lead = False, True, True
            return thought
        end = len(self._held) if last else len(self._held) - overlap(self._held, CLOSING)
        thought = self._held[:end].rstrip()
        self._held = "" if last else self._held[len(thought):]
        self._lead = self._lead and not thought
        return thought

    def _opening(self, last: bool) -> bool:
        """Whether it is known how the reply begins."""
        start = self._held.lstrip()
        if not last and OPENING.startswith(start):
            return False
        self._begin = False
        if start.startswith(OPENING):
            self._held, self._inside = start[len(OPENING):], True
        self._lead, self._answering = self._inside, not self._inside
        return True

    def _behind(self, ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """The tokens that `text`, the end of theirs, was written with: marks of calls are looked for among them."""
        first = bisect_left(range(len(ids)), -len(text),
                            key=lambda i: -len(self._tokenizer.decode(ids[i:], start=False)))
        return ids[first:]


def opened(prompt: str) -> bool:
    """Whether a prompt ends inside a thought."""
    return prompt.rstrip().endswith(OPENING)
