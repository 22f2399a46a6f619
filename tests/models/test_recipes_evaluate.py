"""Scores of replies that are known: references, and nothing at all; the card made of figures."""
from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from edge_runtime.models.bundled import question_prompt, summarize_prompt
from edge_runtime.models.recipes.card import table
from edge_runtime.models.recipes.corpus import document_at
from edge_runtime.models.recipes.documents import make_document
from edge_runtime.models.recipes.evaluate import EVALUATION_SEED, chat_prompt, evaluate, grounded_words, kept_facts
from edge_runtime.models.recipes.grammar import worked_sum

COUNT = 30


def references(split: str) -> dict[str, str]:
    found = {}
    for index in range(COUNT):
        document = document_at(split, EVALUATION_SEED, index)
        found[chat_prompt(summarize_prompt(document.text))] = document.summary
        for question, answer in reversed(document.questions):
            found[chat_prompt(question_prompt(document.text, question))] = answer
    return found


@pytest.mark.parametrize("split", ["held_out", "novel"])
def test_the_reference_keeps_everything(split):
    known = references(split)
    score = evaluate(lambda prompts, most: [known.get(prompt, "") for prompt in prompts], split, COUNT)
    assert score.facts_kept == score.documents_with_all_facts == score.exact_summaries == 1
    assert score.grounded == 1 and score.facts > 100 and score.lookups > 10
    assert score.answers_exact > 0.97 and score.unknown_right > 0.97  # a digest may ask one question twice


def test_silence_keeps_nothing():
    def silent(prompts: Sequence[str], most: int) -> list[str]:
        return ["" for _ in prompts]

    score = evaluate(silent, "held_out", COUNT, show=3)
    assert score.facts_kept == score.answers_exact == score.exact_summaries == score.lookups_exact == 0
    assert len(score.bad) == 6 and all("reference" in case for case in score.bad)


def test_a_wrong_name_is_not_grounded():
    document = make_document(random.Random(2))
    assert all(grounded_words(document, document.summary)) and all(kept_facts(document, document.summary))
    assert grounded_words(document, "It was seen by Xaverius 987654321.") == [False, False]


def test_sums_show_their_working():
    assert worked_sum("34", "17") == "34 + 17 = 51"


def test_tables_are_markdown():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
