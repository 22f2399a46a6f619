"""Sentences chosen by their self-information under a model (selective context, arXiv 2310.06201).

A token's self-information is -log p(token | what stands before it): what the model can guess anyway carries little. A
sentence's is the mean over its tokens. https://arxiv.org/abs/2310.06201, section 3.
"""
from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.backend import SCORE_TOKENS, Backend
from edge_runtime.apps.summarizer.chunks import count_words, split_sentences, split_text
from edge_runtime.apps.summarizer.prompts import Shape

EXTRACT_WORDS = 60  # of an extractive summary, where no length is asked for
# Characters: what is longer than LONG has lost its sentences (tables, logs, scripts without marks), and is cut at lines
# and words to pieces of at most PIECE, a long sentence's length.
LONG, PIECE = 600, 240
FEW_WORDS = 4  # a line of fewer is a heading, a greeting or a number, and tells little alone


@dataclass(frozen=True)
class Sentence:
    """text: with the white space after it; information: mean over its tokens, in nats."""

    text: str
    tokens: int
    information: float


def scored(text: str, backend: Backend) -> Generator[list[Ask], list[Answer], tuple[list[Sentence], list[Answer]]]:
    """The sentences of a text, and the answers that their scores came from."""
    sentences = [part for sentence in split_sentences(text)
                 for part in ([sentence] if len(sentence) <= LONG else split_text(sentence, PIECE, len))]
    units = backend.units(sentences)
    asks, owners = _asks(units, min(SCORE_TOKENS, backend.context - 2))
    answers = yield asks
    nats, counts = [0.0] * len(units), [0] * len(units)
    for owner, answer in zip(owners, answers):
        for number, (information, tokens) in zip(owner, answer.values):
            nats[number] += information
            counts[number] += tokens
    seen: set[str] = set()
    found = []
    for sentence, unit, nat, count in zip(sentences, units, nats, counts):
        words = " ".join(sentence.split())
        # Said before, word for word, it tells nothing: a small model does not see that by itself.
        found.append(Sentence(sentence, len(unit), nat / count if count and words not in seen else 0.0))
        seen.add(words)
    return found, answers


def _asks(units: Sequence[list[int]], limit: int) -> tuple[list[Ask], list[list[int]]]:
    """Stretches of at most `limit` tokens, and which sentences they hold; a longer sentence lies in several."""
    stretches: list[list[list[int]]] = [[]]
    owners: list[list[int]] = [[]]
    size = 0
    for number, unit in enumerate(units):
        for part in [unit[at:at + limit] for at in range(0, len(unit), limit)]:
            if size + len(part) > limit:
                stretches.append([])
                owners.append([])
                size = 0
            stretches[-1].append(part)
            owners[-1].append(number)
            size += len(part)
    return [Ask("score", stretch, level=-1, chunk=i) for i, stretch in enumerate(stretches)], owners


def compressed(sentences: Sequence[Sentence], share: float) -> str:
    """The text without its least informative sentences: at most `share` of its tokens, one sentence at least."""
    budget = share * sum(sentence.tokens for sentence in sentences)
    kept: set[int] = set()
    for number in _ranked(sentences):
        if kept and (sentences[number].tokens > budget or not sentences[number].information):
            continue
        kept.add(number)
        budget -= sentences[number].tokens
    return "".join(sentence.text for number, sentence in enumerate(sentences) if number in kept)


def extracted(sentences: Sequence[Sentence], shape: Shape) -> str:
    """The most informative sentences that the shape's words allow, in their order."""
    telling = [s for s in sentences if count_words(s.text) >= FEW_WORDS and not s.text.lstrip().startswith("#")]
    candidates = [s for s in telling if s.information > 0] or telling or [s for s in sentences if s.text.strip()]
    budget = shape.words or EXTRACT_WORDS
    candidates = [s for s in candidates if count_words(s.text) <= budget] or candidates
    kept: list[int] = []
    for number in _ranked(candidates):
        size = count_words(candidates[number].text)
        if kept and (size > budget or shape.style == "headline"):
            continue
        kept.append(number)
        budget -= size
    chosen = " ".join(" ".join(candidates[number].text.split()) for number in sorted(kept))
    return Shape(None, shape.style).applied(chosen) if shape.style == "bullets" else chosen


def _ranked(sentences: Sequence[Sentence]) -> list[int]:
    """Numbers, the most informative first, the earlier first among equals."""
    return sorted(range(len(sentences)), key=lambda number: (-sentences[number].information, number))
