"""Texts cut into chunks of so many tokens, and into sentences."""
from __future__ import annotations

import re
from collections.abc import Callable

from edge_runtime.errors import InvalidRequestError

# Where a text may be cut, best first: before headings, between paragraphs, lines, sentences, words; then characters.
SENTENCE_END = re.compile(r"[.!?…؟۔।॥።][\"'”’)\]]*\s+|[。！？]+[”’」』）]*\s*")
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{1,2}|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,4}|"
                  "[^\\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,24}")
TAIL = 16  # characters
# What ends in a period and ends no sentence: Mr. A. e.g. 1.
NO_END = re.compile(r"(?:^|[\s(])(?:[A-Z]|\d{1,2}|e\.g|i\.e|[Ee]tc|Mrs?|Ms|Dr|Prof|St|No|Fig|vs|cf)\.\s$")
BORDERS = (re.compile(r"\n(?=#{1,2} )"), re.compile(r"\n(?=#{1,6} )"), re.compile(r"\n[ \t]*\n\s*"),
           re.compile(r"\n+"), SENTENCE_END, re.compile(r"\s+"))


def split_text(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Pieces of at most `limit` tokens each, as `count` counts them, cut at the best border that serves and filled.
    Joined, the pieces are the text, but for pieces of nothing but white space, which are left out.

    Raises InvalidRequestError where a single character takes more than `limit`.
    """
    if limit < 1:
        raise InvalidRequestError("tokens per chunk", limit, "at least 1: the prompt leaves no room for a document")
    return [piece for piece in _split(text, limit, count, 0) if piece.strip()]


def split_sentences(text: str) -> list[str]:
    """Sentences with the white space after them: joined, they are the text. A heading, a line of a list and a
    paragraph's end end one too."""
    found = []
    for paragraph in _parts(re.compile(r"\n[ \t]*\n\s*|\n(?=\s*(?:[-*#>|]|\d+[.)]\s))|(?<=:)\n"), text):
        found += _parts(SENTENCE_END, paragraph)
    whole: list[list[str]] = []
    tail = ""  # of the last one, longer than any abbreviation: of a list of initials, searched whole, minutes come
    for part in found:
        if whole and (not part.strip() or NO_END.search(tail)):
            whole[-1].append(part)
            tail = (tail + part[-TAIL:])[-TAIL:]
        else:
            whole.append([part])
            tail = part[-TAIL:]
    return ["".join(parts) for parts in whole]


def count_words(text: str) -> int:
    """Words, and for scripts without spaces between them about as many as they have: two characters of Chinese or
    Japanese, four of Thai, Lao, Burmese or Khmer, twenty-four of what has no end in any other."""
    return sum(1 for _ in WORD.finditer(text))


def _parts(border: re.Pattern[str], text: str) -> list[str]:
    """The text cut after every match."""
    ends = [match.end() for match in border.finditer(text)]
    starts = [0, *(end for end in ends if end < len(text))]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])] if text else []


def _split(text: str, limit: int, count: Callable[[str], int], level: int) -> list[str]:
    if count(text) <= limit:
        return [text]
    parts = _parts(BORDERS[level], text) if level < len(BORDERS) else _halves(text, limit)
    if len(parts) == 1:
        return _split(text, limit, count, level + 1)
    pieces: list[str] = []
    sizes = [count(part) for part in parts]
    at = 0
    while at < len(parts):
        if sizes[at] > limit:
            pieces += _split(parts[at], limit, count, min(level + 1, len(BORDERS)))
            at += 1
            continue
        end, total = at + 1, sizes[at]
        while end < len(parts) and total + sizes[end] <= limit:
            total += sizes[end]
            end += 1
        joined = "".join(parts[at:end])
        while end - at > 1 and count(joined) > limit:  # parts joined may take a token more than alone
            end -= 1
            joined = "".join(parts[at:end])
        pieces.append(joined)
        at = end
    return pieces


def _halves(text: str, limit: int) -> list[str]:
    if len(text) < 2:
        raise InvalidRequestError("tokens per chunk", limit, f"enough for the single character {text!r}")
    return [text[:len(text) // 2], text[len(text) // 2:]]
