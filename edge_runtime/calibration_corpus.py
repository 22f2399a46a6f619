"""Prompts of the kind that the bundled model was made for, about documents that its training never saw."""
from __future__ import annotations

from typing import Any

from edge_runtime.models.bundled import question_prompt, summarize_prompt

SPLIT = "held_out"
SEED, JUDGED_SEED = 101, 7  # what is calibrated on is not judged on: seeds share no documents
QUESTION_EVERY = 4


def prompts(count: int, seed: int = SEED) -> list[str]:
    """User messages, one per document, so that they are independent: summaries, and a question in every fourth."""
    found = []
    for number in range(count):
        document = _document(number, seed)
        found.append(question_prompt(document.text, document.questions[0][0]) if _asks(number, document)
                     else summarize_prompt(document.text))
    return found


def facts(number: int, seed: int = SEED) -> tuple[str, ...]:
    """The key facts that a reply to prompt `number` should hold; none for a question."""
    document = _document(number, seed)
    return () if _asks(number, document) else tuple(document.facts)


def _asks(number: int, document: Any) -> bool:
    return number % QUESTION_EVERY == QUESTION_EVERY - 1 and bool(document.questions)


def _document(number: int, seed: int) -> Any:
    from edge_runtime.models.recipes.corpus import document_at

    return document_at(SPLIT, seed, number)
