"""Sentences by their self-information: the measure, what is dropped, what is picked; prompts and shapes."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.apps.documents import Document
from edge_runtime.apps.summarizer import Summarizer
from edge_runtime.apps.summarizer.backend import LocalBackend
from edge_runtime.apps.summarizer.chunks import count_words, split_sentences
from edge_runtime.apps.summarizer.prompts import Prompts, Shape, fill
from edge_runtime.apps.summarizer.selection import Sentence, compressed, extracted, scored
from edge_runtime.errors import InvalidRequestError
from edge_runtime.llm import LLM
from edge_runtime.models.bundled import SUMMARIZE_PROMPT

TEXT = ("The office was open on Tuesday. The office was open on Tuesday. The office was open on Tuesday. "
        "Nina Haddad gave a marble clock to the Dorwick Museum. The office was open on Tuesday. "
        "It was made in 1741 and restored by Bruno Farina. The office was open on Tuesday.")


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1) as opened:
        yield opened


def run(job, backend):
    """A job's result, its asks answered at once."""
    import threading

    try:
        asks = next(job)
        while True:
            asks = job.send([backend.ask(ask, threading.Event(), lambda tokens: None) for ask in asks])
    except StopIteration as end:
        return end.value


def test_information_is_that_of_the_models_log_probabilities(llm):
    sentences, _ = run(scored(TEXT, LocalBackend(llm)), LocalBackend(llm))
    assert [s.text for s in sentences] == split_sentences(TEXT)
    units = [llm.tokenize(s.text, add_special=False) for s in sentences]
    first = llm.tokenize("")
    nats = -llm.score([[*first, *(token for unit in units for token in unit)]])[0][len(first):]
    at = 0
    for number, (sentence, unit) in enumerate(zip(sentences, units)):
        assert sentence.tokens == len(unit)
        expected = float(np.nanmean(nats[at:at + len(unit)])) if number in (0, 3, 5) else 0.0  # others repeat the first
        assert sentence.information == pytest.approx(expected, rel=1e-5)
        at += len(unit)


def test_long_texts_are_scored_in_stretches_of_any_length(llm, monkeypatch):
    backend = LocalBackend(llm)
    monkeypatch.setattr("edge_runtime.apps.summarizer.selection.SCORE_TOKENS", 16)
    sentences, answers = run(scored(TEXT + " word" * 60, backend), backend)
    assert len(answers) > 5 and all(sentences[i].information > 0 for i in (0, 3, 5, -1))
    assert all(answer.prompt_tokens <= 17 for answer in answers)


def test_compression_drops_the_least_informative_first_and_keeps_order():
    sentences = [Sentence("a. ", 10, 3.0), Sentence("b. ", 10, 1.0), Sentence("c. ", 10, 2.0), Sentence("d.", 10, 4.0)]
    assert compressed(sentences, 1.0) == "a. b. c. d."
    assert compressed(sentences, 0.75) == "a. c. d."
    assert compressed(sentences, 0.5) == "a. d."
    assert compressed(sentences, 0.01) == "d."


def test_extraction_keeps_to_the_words_and_the_order():
    texts = ["# A heading of four words\n", "One two three four. ", "Five six seven eight nine. ", "Hi. ",
             "Ten to the end."]
    sentences = [Sentence(text, 5, value) for text, value in zip(texts, (9.0, 2.0, 1.0, 8.0, 3.0))]
    assert extracted(sentences, Shape(8)) == "One two three four. Ten to the end."
    assert extracted(sentences, Shape(1)) == "Ten to the end."
    assert extracted(sentences, Shape(8, "bullets")) == "- One two three four.\n- Ten to the end."
    assert extracted(sentences, Shape(50, "headline")) == "Ten to the end."
    assert extracted([Sentence("Hi.", 2, 1.0)], Shape()) == "Hi."


def test_extraction_keeps_to_the_length_in_scripts_without_spaces():
    sentences = [Sentence(f"第{i}个会议在星期二下午举行，大家讨论了新的计划。", 20, float(i)) for i in range(40)]
    chosen = extracted(sentences, Shape(40))
    assert 20 <= count_words(chosen) <= 40 and "第39个" in chosen and "第38个" in chosen
    assert count_words(Shape(40).applied("".join(s.text for s in sentences))) <= 40
    assert count_words("two words") == 2 and count_words("ภาษาไทยไม่เว้นวรรค") in range(3, 7)


@pytest.mark.parametrize("text", ["word number five " * 3000, "x" * 30_000, "การประชุมเลื่อนไปวันจันทร์" * 200,
                                  "".join(f"host-{i} up {i * 7} days\n" for i in range(400))])
def test_texts_without_sentences_are_cut_shorter_too(llm, tmp_path, text):
    summary = Summarizer(llm, strategy="extractive", length=20).summarize(Document(tmp_path / "x", text))
    assert 0 < len(summary.text or "") <= 500
    sentences, _ = run(scored(text, LocalBackend(llm)), LocalBackend(llm))
    assert len(compressed(sentences, 0.5)) < 0.75 * len(text)


def test_extraction_prefers_sentences_that_fit():
    long, short = Sentence("word " * 500 + "end. ", 501, 9.0), Sentence("Five words that say it.", 6, 1.0)
    assert extracted([long, short], Shape(40)) == "Five words that say it."


def test_the_bundled_model_extracts_from_any_text(llm, tmp_path):
    summary = Summarizer(llm, strategy="extractive", length=26).summarize(Document(tmp_path / "x", TEXT))
    sentences = [s.strip() for s in split_sentences(summary.text or "")]
    assert sentences == ["The office was open on Tuesday.", "Nina Haddad gave a marble clock to the Dorwick Museum.",
                         "It was made in 1741 and restored by Bruno Farina."]
    assert len((summary.text or "").split()) <= 26 and summary.strategy == "extractive"
    assert summary.completion_tokens == 0


def test_compression_makes_the_read_text_shorter(llm, tmp_path):
    asked = []
    job = Summarizer(llm, compress=0.5)
    real = job.backend.ask
    job.backend.ask = lambda ask, stop, tick: asked.append(ask) or real(ask, stop, tick)  # type: ignore[method-assign]
    summary = job.summarize(Document(tmp_path / "x", TEXT))
    [chat] = [ask for ask in asked if ask.kind == "chat"]
    read = chat.content[0]["content"].removeprefix(SUMMARIZE_PROMPT.replace("{document}", ""))
    whole = len(llm.tokenize(TEXT, add_special=False))
    assert 0.25 * whole < len(llm.tokenize(read, add_special=False)) <= 0.5 * whole + 1
    assert read.count("office") <= 1 and "Bruno Farina" in read and summary.text


def test_prompts_share_their_beginning_and_say_what_is_wanted():
    prompts = Prompts.build(bundled=False, shape=Shape.of("short", "bullets"))
    for prompt in (prompts.map, prompts.reduce, prompts.refine):
        assert "about 50 words" in prompt and "bullet" in prompt
        assert prompt.index("{document}") > prompt.index("words")  # what is shared comes first
    assert prompts.shape == Shape()
    assert fill("{summary} {document}", "a {summary}", "b {document}") == "b {document} a {summary}"
    own = Prompts.build(bundled=False, prompt="Mine: {document}", shape=Shape.of(30, None))
    assert own.map.endswith("Mine: {document}") and "30 words" in own.map
    for bad in (lambda: Prompts("no", "{document}", "{document}{summary}"),
                lambda: Prompts("{document}", "{document}", "{document}")):
        with pytest.raises(InvalidRequestError):
            bad()


def test_the_bundled_model_is_asked_as_it_was_trained_and_shaped_afterwards(llm, tmp_path):
    assert Summarizer(llm, style="bullets", length="short").prompts.map == SUMMARIZE_PROMPT
    document = Document(tmp_path / "x", "Nina Haddad gave a marble clock to the Dorwick Museum. It was made in 1741.")
    plain = Summarizer(llm).summarize(document).text or ""
    lines = (Summarizer(llm, style="bullets").summarize(document).text or "").splitlines()
    assert [line.removeprefix("- ") for line in lines] == [s.strip() for s in split_sentences(plain)]
    headline = Summarizer(llm, style="headline").summarize(document).text
    assert headline == split_sentences(plain)[0].strip()


@pytest.mark.parametrize("text, words, style, shaped", [
    ("One two. Three four. Five.", 4, None, "One two. Three four."),
    ("One two. Three four. Five.", 1, None, "One two."),
    ("- One.\n- Two.", None, "paragraph", "One. Two."),
    ("One.\n\nTwo.", None, None, "One.\n\nTwo."),
])
def test_shapes(text, words, style, shaped):
    assert Shape(words, style).applied(text) == shaped
