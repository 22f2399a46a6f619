"""Replies that must match a grammar: whatever the model would rather say, they do; what cannot be met is refused."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest

from edge_runtime import Grammar, SamplingParams
from edge_runtime.errors import InvalidRequestError
from edge_runtime.structured import GrammarCompiler
from edge_runtime.tokenizer import Tokenizer
from tests.edge_runtime.llms import fake_llm, settled
from tests.vocabularies import spm_metadata

pytest.importorskip("llguidance")

PERSON = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["name", "age", "tags"], "additionalProperties": False}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema_is_met_by_a_model_that_knows_no_json(temperature):
    with fake_llm() as llm:
        for seed in range(8):
            reply = llm.generate(f"person {seed}", SamplingParams(
                max_tokens=400, temperature=temperature, seed=seed, grammar=Grammar.json_schema(PERSON)))
            assert reply.finish_reason == "stop"
            found = json.loads(reply.text)
            assert set(found) == {"name", "age", "tags"} and len(found["name"]) <= 8 and 0 <= found["age"] <= 120
        settled(llm)


def test_a_reply_ends_with_the_grammar_even_where_end_tokens_are_ignored():
    with fake_llm() as llm:
        reply = llm.generate("x", SamplingParams(grammar=Grammar.regex("(yes|no)"), ignore_eos=True))
        assert reply.text in ("yes", "no") and reply.finish_reason == "stop"


def test_an_open_end_may_stop_at_the_end_token_only_where_it_matches():
    with fake_llm(end_every=2) as llm:
        for i in range(10):
            reply = llm.generate(f"{i}", SamplingParams(grammar=Grammar.regex("[a-z]{3,}"), temperature=0,
                                                        max_tokens=30))
            assert re.fullmatch("[a-z]{3,}", reply.text), reply


def test_lark_with_stream_logprobs_and_penalties():
    grammar = Grammar.lark('start: "sum(" NUMBER ("," NUMBER)* ")"\nNUMBER: /[0-9]{1,3}/')
    with fake_llm() as llm:
        chunks = list(llm.stream("x", SamplingParams(grammar=grammar, logprobs=2, repetition_penalty=1.2,
                                                     frequency_penalty=0.3, max_tokens=300, seed=3)))
        text = "".join(chunk.text for chunk in chunks)
        assert chunks[-1].finish_reason in ("stop", "length")
        assert text.startswith("sum(") and (chunks[-1].finish_reason == "length" or text.endswith(")"))
        count = sum(len(chunk.token_ids) for chunk in chunks)
        assert count == sum(len(chunk.logprobs or ()) for chunk in chunks)


@pytest.mark.parametrize("grammar, says", [
    (Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 2}), "minimum"),
    (Grammar.json_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "'a'"),
    (Grammar.json_schema({"type": "nonsense"}), "nonsense"),
    (Grammar.json_schema(False), "false"),
    (Grammar.json_schema("{no json"), "well formed|met"),
    (Grammar.json_schema({"not": {"type": "string"}}), "not"),
    (Grammar.regex("(a"), "unclosed"),
    (Grammar.lark("start: nothing"), "nothing"),
])
def test_grammars_that_cannot_be_met_are_refused_before_anything_runs(grammar, says):
    with fake_llm() as llm:
        with pytest.raises(InvalidRequestError, match=says):
            llm.generate("x", SamplingParams(grammar=grammar))
        assert llm.engine.steps == 0


def test_lenient_leaves_unknown_keywords_unchecked():
    with fake_llm() as llm:
        schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2, "uniqueItems": True}
        reply = llm.generate("x", SamplingParams(grammar=Grammar.json_schema(schema, lenient=True)))
        assert set(json.loads(reply.text)) <= {1, 2}


def test_what_is_no_grammar():
    with pytest.raises(InvalidRequestError, match="grammar"):
        SamplingParams(grammar={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"grammar\.kind"):
        Grammar("yaml", "")
    with pytest.raises(InvalidRequestError, match="JSON values"):
        Grammar.json_schema({"enum": [object()]})


def test_sentencepiece_vocabularies_with_a_padded_head():
    tokenizer = Tokenizer.from_metadata(spm_metadata())
    mask = GrammarCompiler(tokenizer, tokenizer.vocab_size + 32).compile(Grammar.regex("a b"))
    text = ""
    for _ in range(10):
        scores = np.zeros(tokenizer.vocab_size + 32, np.float32)
        mask.apply(scores)
        token = int(scores.argmax())
        assert scores[token] == 0 and (scores[tokenizer.vocab_size:] == -np.inf).all()
        mask.advance(token)
        text += tokenizer.token_bytes(token).decode()
        if mask.complete:
            break
    assert text == "a b"


def test_a_compiled_grammar_is_kept_and_every_reply_starts_anew():
    with fake_llm() as llm:
        params = SamplingParams(grammar=Grammar.json_schema(PERSON), max_tokens=400)
        replies = llm.generate([f"p{i}" for i in range(12)], params)
        assert all(set(json.loads(reply.text)) == {"name", "age", "tags"} for reply in replies)
        assert len(llm._grammars._compiled) == 1
