"""What the model is asked, by length and style, and the same done to a text where the model cannot be asked."""
from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edge_runtime.apps.summarizer.chunks import count_words, split_sentences
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.bundled import SUMMARIZE_PROMPT

DOCUMENT, SUMMARY = "{document}", "{summary}"
LENGTHS = {"short": 50, "medium": 150, "long": 400}  # words
STYLES = ("paragraph", "bullets", "headline")


@dataclass(frozen=True)
class Shape:
    """words: of a summary, about; None: as it comes. style: "paragraph", "bullets", "headline" or None."""

    words: int | None = None
    style: str | None = None

    @classmethod
    def of(cls, length: str | int | None, style: str | None) -> Shape:
        """length: a name of LENGTHS or a number of words. Raises InvalidRequestError."""
        if style is not None and style not in STYLES:
            raise InvalidRequestError("style", style, f"one of {', '.join(STYLES)}")
        words = LENGTHS.get(str(length)) if length is not None else None
        if length is not None and words is None:
            if not str(length).isdecimal() or not 1 <= int(length) <= 100_000:
                raise InvalidRequestError("length", length, f"one of {', '.join(LENGTHS)}, or a number of words")
            words = int(length)
        return cls(words, style)

    def told(self) -> str:
        """Sentences of a prompt."""
        told = []
        if self.style == "headline":
            told.append("Write a single headline of at most fifteen words.")
        elif self.style == "bullets":
            told.append("Write bullet points, one fact each, every line beginning with '- '.")
        elif self.style == "paragraph":
            told.append("Write plain paragraphs, without headings or lists.")
        if self.words is not None and self.style != "headline":
            told.append(f"Use about {self.words} words.")
        return " ".join(told)

    def applied(self, text: str) -> str:
        """A text's own sentences in this shape: whole ones, as many as the words allow, one at least."""
        kept: list[str] = []
        used = 0
        for sentence in (re.sub(r"^([-*]|\d+[.)])\s+", "", s.strip()) for s in split_sentences(text) if s.strip()):
            size = count_words(sentence)
            if kept and (self.style == "headline" or (self.words is not None and used + size > self.words)):
                break
            kept.append(sentence)
            used += size
        if self.style == "bullets":
            return "\n".join(f"- {' '.join(sentence.split())}" for sentence in kept)
        return " ".join(kept) if self.style or self.words is not None else text.strip()


@dataclass(frozen=True)
class Prompts:
    """map: asks about a document or a chunk; reduce: about several chunks' summaries; refine: about a summary so far,
    `{summary}`, and the next chunk. Each holds `{document}`; what all documents share stands before it, where the
    prefix cache finds it. shape: done to the reply afterwards, by us."""

    map: str
    reduce: str
    refine: str
    shape: Shape = Shape()

    def __post_init__(self) -> None:
        for name in ("map", "reduce", "refine"):
            if DOCUMENT not in getattr(self, name):
                raise InvalidRequestError("prompt" if name == "map" else name, getattr(self, name),
                                          f"a text that holds {DOCUMENT}, where the document goes")
        if SUMMARY not in self.refine:
            raise InvalidRequestError("refine", self.refine, f"a text that holds {SUMMARY} too")

    @classmethod
    def build(cls, *, bundled: bool, prompt: str | None = None, shape: Shape = Shape()) -> Prompts:
        """The prompts of a model. The bundled one was trained on one prompt: its replies are shaped afterwards."""
        if prompt is not None:
            told = shape.told()
            asked = f"{told}\n\n{prompt}" if told else prompt
            return cls(asked, asked, asked.replace(DOCUMENT, f"{SUMMARY}\n\n{DOCUMENT}"))
        if bundled:
            return cls(SUMMARIZE_PROMPT, SUMMARIZE_PROMPT,
                       SUMMARIZE_PROMPT.replace(DOCUMENT, f"{SUMMARY}\n\n{DOCUMENT}"), shape)
        rules = ("Keep names, numbers and dates exactly as they are, add nothing that is not there, and answer with "
                 "the summary alone. " + shape.told()).strip()
        return cls(
            f"Summarize the text below. {rules}\n\nText:\n\n{DOCUMENT}",
            f"Below are summaries of consecutive parts of one text. Combine them into one summary of the whole text. "
            f"{rules}\n\nSummaries:\n\n{DOCUMENT}",
            f"Below are a summary of the beginning of a text and the part that follows. Write the summary of both: "
            f"keep what matters of the first, add what matters of the second. {rules}\n\nSummary so far:\n\n"
            f"{SUMMARY}\n\nNext part:\n\n{DOCUMENT}")

    def without_shape(self) -> Prompts:
        return replace(self, shape=Shape())


def fill(prompt: str, document: str, summary: str = "") -> str:
    """A prompt with its places filled; what is filled in is not searched for places again."""
    parts = {DOCUMENT: document, SUMMARY: summary}
    return re.sub(r"\{document\}|\{summary\}", lambda match: parts[match.group()], prompt)
