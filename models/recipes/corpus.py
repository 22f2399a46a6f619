"""Conversations over synthetic documents, and the seed ranges that keep training and evaluation apart."""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ..bundled import FOLLOW_UP_PROMPT, UNKNOWN_ANSWER, question_prompt, summarize_prompt
from .documents import Document, make_digest, make_document, make_register
from .smalltalk import SYSTEM_PROMPTS, exchange, world_question

# A document's generator is seeded with a string of its split and its index, so the splits share no seed.
SPLITS = ("train", "held_out", "novel")

_SUMMARY_WORDINGS = (
    "Summarize this:\n\n{}",
    "{}\n\nSummarize the text above.",
    "Please summarize the following text:\n\n{}",
    "TL;DR of this text, please:\n\n{}",
    "What are the key facts?\n\n{}",
    "Write a short summary of this text.\n\n{}",
)
_POINTS_PROMPT = "List the key points of the following text.\n\n{}"
_LATER_SUMMARY = ("Summarize it.", "Summarize the text.", "Please give me a summary.", "What are the key facts?")


@dataclass(frozen=True)
class Turn:
    role: str  # system, user or assistant
    text: str


def document_at(split: str, seed: int, index: int) -> Document:
    """Document `index` of a split; the same for ever. One in eight is a digest of several sections.

    `held_out` documents may use any name, `novel` ones only names that training never draws.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{split}/{seed}/{index}")
    names = {"train": False, "held_out": None, "novel": True}[split]
    return make_digest(rng, names) if rng.random() < 0.125 else make_document(rng, names)


def documents(split: str, seed: int, count: int) -> Iterator[Document]:
    return (document_at(split, seed, index) for index in range(count))


def _summary_turns(document: Document, rng: random.Random) -> list[Turn]:
    r = rng.random()
    if r < 0.78:
        prompt, reply = summarize_prompt(document.text), document.summary
    elif r < 0.95:
        prompt, reply = rng.choice(_SUMMARY_WORDINGS).format(document.text), document.summary
    else:
        prompt = _POINTS_PROMPT.format(document.text)
        reply = document.summary_points()
    return [Turn("user", prompt), Turn("assistant", reply)]


def _follow_ups(questions: list[tuple[str, str]], rng: random.Random) -> list[Turn]:
    turns = []
    for question, answer in questions:
        prompt = question if rng.random() < 0.3 else FOLLOW_UP_PROMPT.format(question=question)
        turns += [Turn("user", prompt), Turn("assistant", answer)]
    return turns


def document_turns(document: Document, rng: random.Random) -> list[Turn]:
    """A conversation about one document: a summary, questions, or both in either order."""
    questions = list(document.questions)
    r = rng.random()
    if document.summary and r < 0.55:
        return _summary_turns(document, rng) + _follow_ups(questions[: rng.randint(0, 4)], rng)
    if not questions:
        return _summary_turns(document, rng)
    question, answer = questions[0]
    turns = [Turn("user", question_prompt(document.text, question)), Turn("assistant", answer)]
    turns += _follow_ups(questions[1 : rng.randint(2, 6)], rng)
    if document.summary and r > 0.85:
        turns += [Turn("user", rng.choice(_LATER_SUMMARY)), Turn("assistant", document.summary)]
    return turns


def training_turns(rng: random.Random) -> list[Turn]:
    """One draw of the training mixture: documents, digests of several sections (which need the most
    practice), registers and small talk, and now and then a question that no text here answers."""
    r = rng.random()
    if r < 0.04:
        return [turn for _ in range(rng.randint(1, 4)) for turn in _chat(rng)]
    if r < 0.15:
        turns = document_turns(make_register(rng, False), rng)
    elif r < 0.38:
        turns = document_turns(make_digest(rng, False), rng)
    else:
        turns = document_turns(make_document(rng, False), rng)
    r = rng.random()
    if r < 0.06:  # talk before or after the work
        return _chat(rng) + turns if r < 0.02 else turns + _chat(rng)
    if r < 0.10:
        turns += _follow_ups([(world_question(rng), UNKNOWN_ANSWER)], rng)
    return turns


def _chat(rng: random.Random) -> list[Turn]:
    prompt, reply = exchange(rng)
    return [Turn("user", prompt), Turn("assistant", reply)]


def system_turn(rng: random.Random) -> list[Turn]:
    """A system prompt in one conversation of eight."""
    return [Turn("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.125 else []
