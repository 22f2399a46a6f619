import random

import pytest

from edge_runtime.models import bundled
from edge_runtime.models.recipes import corpus, documents, slots, smalltalk
from edge_runtime.models.recipes.corpus import document_at, training_turns
from edge_runtime.models.recipes.grammar import parse_kinds


def sample(split: str, count: int, seed: int = 3) -> list[documents.Document]:
    return list(corpus.documents(split, seed, count))


def test_documents_are_a_function_of_split_seed_and_index():
    again = [document_at("train", 3, index) for index in reversed(range(50))][::-1]
    assert sample("train", 50) == again
    assert sample("train", 50) != sample("train", 50, seed=4)
    assert not {d.text for d in sample("train", 300)} & {d.text for d in sample("held_out", 300)}


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_facts_occur_in_the_document_and_in_its_summary(split):
    for document in sample(split, 400):
        assert document.facts, document
        for fact in document.facts:
            assert fact.casefold() in document.text.casefold(), (fact, document.text)
            assert fact.casefold() in document.summary.casefold(), (fact, document.summary)


def test_answers_occur_in_the_document_or_are_refused():
    refused = 0
    for document in sample("held_out", 400):
        assert document.questions, document.text
        for question, answer in document.questions:
            assert question.endswith("?")
            if answer == bundled.UNKNOWN_ANSWER:
                refused += 1
            elif "=" in answer:
                check_sum(answer, document.text)
            else:
                assert answer.casefold() in document.text.casefold(), (question, answer, document.text)
    assert refused > 200


def check_sum(answer: str, text: str) -> None:
    first, plus, second, equals, total = answer.split()
    assert (plus, equals) == ("+", "=") and int(first) + int(second) == int(total)
    assert first in text and second in text


def test_sums_are_asked_in_every_split():
    for split in corpus.SPLITS:
        answers = [answer for document in sample(split, 400) for _, answer in document.questions]
        assert sum("=" in answer for answer in answers) > 20


def test_threads_are_mails_to_and_fro():
    rng = random.Random(12)
    for kind in [kind for kind in documents.KINDS if kind.form == "thread"]:
        for _ in range(50):
            document = documents.make_document(rng, kind=kind)
            heads = [line for line in document.text.splitlines() if line.startswith("From: ")]
            assert 1 <= len(heads) <= 3 and len(set(heads)) <= 2


def test_a_question_is_not_both_answered_and_refused():
    for document in sample("train", 400):
        answers: dict[str, set[bool]] = {}
        for question, answer in document.questions:
            answers.setdefault(question, set()).add(answer == bundled.UNKNOWN_ANSWER)
        assert all(len(kinds) == 1 for kinds in answers.values()) or document.kind == "digest"


def test_every_kind_of_document_renders_without_open_slots():
    rng = random.Random(5)
    for kind in documents.KINDS:
        for _ in range(40):
            document = documents.make_document(rng, kind=kind)
            for text in (document.text, document.summary, *sum(document.questions, ())):
                assert not set("{}[]|") & set(text), text
                assert ".." not in text, text


def test_registers_are_looked_up():
    rng = random.Random(6)
    for _ in range(100):
        register = documents.make_register(rng)
        lines = register.text.splitlines()[1:]
        for question, answer in register.questions:
            if "=" in answer:
                check_sum(answer, register.text)
                continue
            found = [line for line in lines if answer in line]
            assert found or answer == bundled.UNKNOWN_ANSWER, (register.text, question, answer)


def test_novel_documents_share_no_town_or_last_name_with_training():
    train, novel = slots.Names(random.Random(1), False), slots.Names(random.Random(2), True)
    for draw in ("last", "town", "stem"):
        seen = {getattr(train, draw)() for _ in range(3000)}
        new = {getattr(novel, draw)() for _ in range(300)}
        assert not any(map(slots.is_held_out, {name.split()[0] for name in seen} if draw == "last" else ()))
        bare = {word for name in new for word in name.split()}
        assert not {name for name in new if name in seen}
        assert bare


def test_documents_have_the_lengths_they_are_made_for():
    words = sorted(len(d.text.split()) for d in sample("train", 400))
    assert words[4] >= 15 and 40 <= words[200] <= 120 and words[-1] <= 500


def test_training_turns_alternate_and_end_with_the_assistant():
    rng = random.Random(8)
    for _ in range(200):
        roles = [turn.role for turn in training_turns(rng)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_small_talk_answers_greetings():
    prompt, reply = smalltalk.exchange(random.Random(0))
    assert prompt and reply


def test_questions_about_the_world_are_refused():
    rng = random.Random(10)
    texts = [turns for _ in range(600) for turns in [training_turns(rng)]]
    world = [(turns[i].text, turns[i + 1].text) for turns in texts for i in range(0, len(turns), 2)
             if "capital of" in turns[i].text.splitlines()[-1]]
    assert world
    assert all("not say" in reply or "not know" in reply for _, reply in world)


def test_prompts_of_the_bundle_are_those_of_the_corpus():
    assert bundled.summarize_prompt("A {question} b") == "Summarize the following text.\n\nA {question} b"
    assert bundled.question_prompt("A {question} b", "Who?") == "A {question} b\n\nQuestion: Who?"
    rng = random.Random(9)
    users = [turn.text for _ in range(400) for turn in training_turns(rng) if turn.role == "user"]
    assert sum(text.startswith("Summarize the following text.\n\n") for text in users) > 60


def test_the_notation_names_a_wrong_line():
    with pytest.raises(ValueError, match="line 3"):
        parse_kinds("KIND a\n= b!\nwrong: c")


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="validation"):
        document_at("validation", 0, 0)
