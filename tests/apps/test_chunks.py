"""Cutting texts: nothing lost, order kept, limits kept."""
from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.apps.summarizer.chunks import split_sentences, split_text
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models import bundled
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.tokenizer import Tokenizer

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
JOINTS = st.sampled_from([" ", " ", ". ", "! ", "。", ".\" ", "\n", "\n\n", "\n\n\n", "\n## ", "\n# ", "\n- ", "  ",
                          "\t"])
TEXTS = st.lists(st.tuples(WORDS, JOINTS), min_size=1, max_size=60).map(lambda parts: "".join(map("".join, parts)))


def count_words(text: str) -> int:
    """A tokenizer of sorts: words of up to four letters, and marks."""
    return sum(-(-len(word) // 4) for word in text.split())


@pytest.fixture(scope="module")
def count_tokens():
    with GGUFFile(bundled.path()) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    return lambda text: len(tokenizer.encode(text, add_special=False))


@settings(max_examples=200, deadline=None, print_blob=True)
@given(TEXTS, st.sampled_from([1, 3, 10, 50, 1000]))
def test_pieces_fit_and_lose_nothing(text, limit):
    pieces = split_text(text, limit, count_words)
    assert all(count_words(piece) <= limit and piece.strip() for piece in pieces)
    at = 0
    for piece in pieces:  # in order, and nothing but white space between them
        found = text.index(piece, at)
        assert not text[at:found].strip()
        at = found + len(piece)
    assert not text[at:].strip()


@settings(max_examples=60, deadline=None, print_blob=True)
@given(TEXTS, st.sampled_from([8, 30, 200]))
def test_pieces_fit_the_models_own_tokenizer(count_tokens, text, limit):
    pieces = split_text(text, limit, count_tokens)
    assert all(count_tokens(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@settings(max_examples=200, deadline=None, print_blob=True)
@given(TEXTS)
def test_sentences_joined_are_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentence.strip() for sentence in sentences) or not text.strip()


def test_pieces_are_cut_at_the_best_border_and_filled():
    paragraphs = [f"Paragraph {i}. It has two sentences." for i in range(6)]
    text = "\n\n".join(paragraphs)
    one = count_words(paragraphs[0])
    assert split_text(text, one, count_words) == [p + "\n\n" for p in paragraphs[:-1]] + paragraphs[-1:]
    assert len(split_text(text, 2 * one, count_words)) == 3
    assert split_text("One two three. Four five six.", 5, count_words) == ["One two three. ", "Four five six."]
    assert split_text("short", 10, count_words) == ["short"]


def test_chunks_begin_at_headings():
    sections = [f"# Part {i}\n\n{'Some words stand here. ' * 3}\n\nAnd a second paragraph.\n" for i in range(4)]
    text = "".join(sections)
    pieces = split_text(text, count_words(sections[0]) + 5, count_words)
    assert pieces == sections


def test_sentences_end_where_a_reader_says():
    text = ("Dr. Smith paid 3.50 euros. \"Was that all?\" he asked. Yes!\n\n# A heading\nA line\ngoes on here.\n- one\n"
            "- two e.g. three.")
    assert [s.strip() for s in split_sentences(text)] == [
        "Dr. Smith paid 3.50 euros.", "\"Was that all?\"", "he asked.", "Yes!", "# A heading\nA line\ngoes on here.",
        "- one", "- two e.g. three."]


def test_sentences_end_in_other_scripts():
    assert split_sentences("यह एक है। यह दो है। क्या?") == ["यह एक है। ", "यह दो है। ", "क्या?"]
    assert split_sentences("هل وصلت؟ نعم.") == ["هل وصلت؟ ", "نعم."]


def test_a_long_list_of_initials_takes_no_minutes():
    began = time.thread_time()
    assert split_sentences("A. " * 40_000) == ["A. " * 40_000]
    assert time.thread_time() - began < 5  # a search from the beginning for each took 70 s


def test_a_limit_that_nothing_fits_is_refused():
    with pytest.raises(InvalidRequestError):
        split_text("text", 0, count_words)
    with pytest.raises(InvalidRequestError, match="'x'"):
        split_text("x", 1, lambda text: 2)
