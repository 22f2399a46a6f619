"""What callers of LLM see, on the fake device."""
from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edge_runtime import LLM, SamplingParams
from edge_runtime.chat_template import ChatTemplate
from edge_runtime.errors import (
    ChatTemplateError,
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    ModelNotFoundError,
    NumericalError,
    OutOfMemoryError,
    TokenizerError,
)
from tests.edge_runtime.llms import fake_llm, fake_of, settled
from tests.fake_device import BOS, EOS, FakeDevice, byte_tokenizer, greedy

TOKENIZER = byte_tokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def ids_of(text: str) -> list[int]:
    return [BOS, *text.encode()]


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


@pytest.fixture
def llm():
    with fake_llm() as llm:
        yield llm


def test_generate_one(llm):
    reply = llm.generate("hello", GREEDY)
    assert reply.token_ids == tuple(greedy(ids_of("hello"), 12))
    assert reply.text == text_of(reply.token_ids) == str(reply)
    assert reply.finish_reason == "length" and reply.logprobs is None and reply.error is None
    stats = reply.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (6, 0, 12)
    assert 0 <= stats.queued <= stats.ttft <= stats.seconds < 10
    assert stats.tokens_per_second > 0 and stats.prompt_tokens_per_second > 0


def test_generate_many_in_input_order_batched_equals_alone(llm):
    prompts = [f"prompt {i} " * (i % 7 + 1) for i in range(100)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + i % 20) for i in range(100)]
    calls = []
    replies = llm.generate(prompts, params, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 100) for i in range(100)]
    for prompt, one, reply in zip(prompts, params, replies):
        alone = llm.generate(prompt, one)
        assert (reply.text, reply.token_ids) == (alone.text, alone.token_ids)
        if one.temperature == 0:
            assert reply.token_ids == tuple(greedy(ids_of(prompt), one.max_tokens))
    assert llm.generate([]) == []
    settled(llm)


def test_prompts_as_token_ids(llm):
    expected = llm.generate("hello", GREEDY).token_ids
    for prompt in (ids_of("hello"), tuple(ids_of("hello")), np.array(ids_of("hello"))):
        assert llm.generate(prompt, GREEDY).token_ids == expected
    assert [r.token_ids for r in llm.generate([ids_of("hello"), "hello"], GREEDY)] == [expected] * 2


def test_stream_joins_to_the_reply(llm):
    reply = llm.generate("hello", GREEDY, logprobs=2)
    generation = llm.stream("hello", GREEDY, logprobs=2)
    chunks = list(generation)
    assert "".join(c.text for c in chunks) == reply.text
    assert sum((c.token_ids for c in chunks), ()) == reply.token_ids
    assert sum((c.logprobs for c in chunks), ()) == reply.logprobs
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[0].stats is None and chunks[-1].stats.completion_tokens == 12
    assert generation.reply.text == reply.text and len(chunks) == 12


def test_chat_renders_the_template(llm):
    expected = TOKENIZER.encode("[user] hi</s>[assistant] ", parse_special=True)
    assert EOS in expected
    reply = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert reply.token_ids == tuple(greedy(expected, 12))
    assert llm.chat("hi", GREEDY).token_ids == reply.token_ids
    assert "".join(c.text for c in llm.chat("hi", GREEDY, stream=True)) == reply.text
    with pytest.raises(InvalidRequestError, match="role"):
        llm.chat([{"content": "hi"}])
    with fake_llm(chat_template=None) as bare, pytest.raises(ChatTemplateError, match="generate"):
        bare.chat("hi")


def test_end_token_ends_and_is_not_part_of_the_reply():
    with fake_llm(end_every=5) as llm:
        replies = llm.generate([f"p{i}" for i in range(30)], temperature=0, max_tokens=30)
        for i, reply in enumerate(replies):
            expected = greedy(ids_of(f"p{i}"), 30, fake_of(llm))
            assert reply.token_ids == tuple(expected) and EOS not in reply.token_ids
            assert reply.finish_reason == ("length" if len(expected) == 30 else "stop")
            assert reply.stats.completion_tokens == len(reply.token_ids)
        assert {r.finish_reason for r in replies} >= {"stop"}
        forced = llm.generate("p1", temperature=0, max_tokens=30, ignore_eos=True)
        assert len(forced.token_ids) == 30 and EOS in forced.token_ids and forced.finish_reason == "length"


def test_stop_strings_and_stop_tokens(llm):
    whole = llm.generate("hello", temperature=0, max_tokens=30).text
    stop = whole[10:14]
    assert whole.index(stop) == 10
    for stops in (stop, ["never", stop], [stop, whole[12:20]]):
        reply = llm.generate("hello", temperature=0, max_tokens=30, stop=stops)
        assert (reply.text, reply.finish_reason) == (whole[:10], "stop")
        chunks = list(llm.stream("hello", temperature=0, max_tokens=30, stop=stops))
        assert "".join(c.text for c in chunks) == whole[:10]
        assert sum((c.token_ids for c in chunks), ()) == reply.token_ids
    token = llm.generate("hello", temperature=0, max_tokens=30, stop_token_ids=[ord(whole[5])])
    assert token.text == whole[:whole.index(whole[5])] and token.finish_reason == "stop"
    cut = llm.generate("hello", temperature=0, max_tokens=12, stop=whole[10:14])
    assert (cut.text, cut.finish_reason) == (whole[:12], "length")  # held-back text comes out at the end
    long = llm.generate("hello", temperature=0, max_tokens=30, stop=["x" * 10_000, whole[9:11]])
    assert long.text == whole[:9]


def test_characters_are_never_split(llm):
    bias = {byte: 200.0 for byte in "é".encode()[:1]}
    reply = llm.generate("x", temperature=0, max_tokens=1, logit_bias=bias)
    assert reply.text == "\ufffd" and reply.token_ids == (0xC3,)


def test_logprobs(llm):
    reply = llm.generate("hello", GREEDY, logprobs=3)
    history = ids_of("hello")
    for token, found in zip(reply.token_ids, reply.logprobs):
        logits = FakeDevice().logits(np.array(history, np.int32)).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert found.token_id == token == found.top[0][0]
        assert found.logprob == pytest.approx(expected[token], abs=1e-4)
        assert len(found.top) == 3
        history.append(token)


def test_the_same_seed_gives_the_same_text_in_any_company(llm):
    params = SamplingParams(temperature=1.5, top_p=1.0, seed=42, max_tokens=40)
    alone = llm.generate("the prompt", params).text
    crowd = llm.generate([f"other {i}" for i in range(40)] + ["the prompt"], params)
    assert crowd[-1].text == alone
    assert llm.generate("the prompt", params, seed=43).text != alone
    with fake_llm(pages=8) as small:
        crowd = small.generate([f"other {i}" * 9 for i in range(6)] + ["the prompt"], params, max_tokens=100)
        assert small.engine.batcher.preemptions > 0
        assert crowd[-1].text == llm.generate("the prompt", params, max_tokens=100).text


def test_cached_prefixes_give_the_same_text(llm):
    prompt = "a long beginning " * 20
    first = llm.generate(prompt + "end", GREEDY)
    again = llm.generate(prompt + "end", GREEDY)
    other = llm.generate(prompt + "other end", GREEDY)
    assert (first.stats.cached_tokens, again.stats.cached_tokens, other.stats.cached_tokens) == (0, 320, 320)
    assert again.text == first.text
    assert other.token_ids == tuple(greedy(ids_of(prompt + "other end"), 12))


def test_embed(llm):
    texts = ["one", "two " * 100, "one"]
    found = llm.embed(texts)
    assert found.shape == (3, 8) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1) and (found[0] == found[2]).all()
    for pooling in ("mean", "last"):
        states = np.array([FakeDevice.hidden(np.array(ids_of(texts[1])[:n], np.int32))
                           for n in range(1, len(ids_of(texts[1])) + 1)])
        expected = states.mean(axis=0) if pooling == "mean" else states[-1]
        assert np.allclose(llm.embed(texts[1], pooling, normalize=False), expected, atol=1e-6)
    with pytest.raises(InvalidRequestError, match="pooling"):
        llm.embed(texts, pooling="max")
    with pytest.raises(InvalidRequestError, match="texts"):
        llm.embed([1, 2])
    assert llm.embed([]).shape[0] == 0


def test_score(llm):
    texts = ["A text of some words", "b" * 700, "c"]
    device = FakeDevice()
    for text, scores in zip(texts, llm.score(texts)):
        ids = np.array(llm.tokenize(text), np.int32)
        assert scores.dtype == np.float32 and scores.shape == ids.shape and np.isnan(scores[0])
        for at in (1, len(ids) // 2, len(ids) - 1):
            logits = device.logits(ids[:at]).astype(np.float64)
            assert scores[at] == pytest.approx(logits[ids[at]] - np.log(np.exp(logits).sum()), abs=1e-4)
    assert llm.score([]) == [] and len(llm.score([[5, 6, 7]])[0]) == 3
    with pytest.raises(InvalidRequestError):
        llm.score("one text")


def test_scores_beside_replies_change_nothing(llm):
    alone = llm.generate("beside", max_tokens=20, temperature=0).text
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(llm.generate, "beside", max_tokens=20, temperature=0) for _ in range(8)]
        scores = [pool.submit(llm.score, ["d" * 500]) for _ in range(8)]
        assert {reply.result().text for reply in replies} == {alone}
        first = scores[0].result()[0]
        assert all((score.result()[0][1:] == first[1:]).all() for score in scores)


def test_tokenize(llm):
    assert llm.tokenize("hi") == ids_of("hi") and llm.tokenize("hi", add_special=False) == list(b"hi")
    assert llm.detokenize(ids_of("hi")) == "hi"
    with pytest.raises(TokenizerError, match="999"):
        llm.detokenize([999])


# Bad input


@pytest.mark.parametrize(("prompt", "error", "words"), [
    ([], InvalidRequestError, "at least one token"), ([1, 260], TokenizerError, "260"), ([-1], TokenizerError, "-1"),
    ([2**80, 1], TokenizerError, "outside"),
    ([1, 2.5], InvalidRequestError, "token ids"), ([1, True], InvalidRequestError, "token ids"),
    ([1, "a"], InvalidRequestError, "token ids"), (5, InvalidRequestError, "prompt"),
    (None, InvalidRequestError, "prompt"), (b"bytes", InvalidRequestError, "prompt"),
    ("x" * 5000, ContextLengthError, "5001 prompt tokens"), ("x" * 4095, ContextLengthError, "4096"),
    ("\ud800", TokenizerError, "surrogate"),
])
def test_bad_prompts_are_refused_before_anything_runs(prompt, error, words):
    with fake_llm() as llm:
        with pytest.raises(error, match=words):
            llm.generate(np.array([], np.int32) if prompt == [] else prompt)
        with pytest.raises(error, match=words):
            llm.generate(["fine", prompt])
        assert fake_of(llm).sizes == []
        llm.generate("fine", GREEDY)


def test_empty_prompt_with_and_without_bos(llm):
    assert llm.generate("", GREEDY).token_ids == tuple(greedy([BOS], 12))
    with fake_llm(bos=False) as bare:
        with pytest.raises(InvalidRequestError, match="no BOS"):
            bare.generate("")
        assert bare.generate("x", GREEDY).token_ids == tuple(greedy([ord("x")], 12))


def test_max_tokens_zero(llm):
    reply = llm.generate("hello", max_tokens=0)
    assert (reply.text, reply.token_ids, reply.finish_reason) == ("", (), "length")
    chunks = list(llm.stream("hello", max_tokens=0))
    assert [(c.text, c.finish_reason) for c in chunks] == [("", "length")]
    with pytest.raises(ContextLengthError):
        llm.generate("x" * 5000, max_tokens=0)


def test_the_context_ends_a_reply():
    with fake_llm(context=50) as llm:
        reply = llm.generate("x" * 29, temperature=0, max_tokens=None)
        assert len(reply.token_ids) == 20 and reply.finish_reason == "length"
        assert llm.generate("x" * 29, temperature=0, max_tokens=100).token_ids == reply.token_ids
        assert len(llm.generate("x" * 48, temperature=0).token_ids) == 1


@pytest.mark.parametrize("values", [{"temperature": -1}, {"tempo": 1}, {"logit_bias": {9999: 1.0}},
                                    {"stop_token_ids": [9999]}, {"stop": [""]}, {"priority": "urgent"}])
def test_bad_parameters(llm, values):
    for call in (llm.generate, llm.chat, llm.stream):
        with pytest.raises(InvalidRequestError):
            call("hello", **values)
    with pytest.raises(InvalidRequestError, match="as many as prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(InvalidRequestError, match="stream"):
        llm.generate(["a"], stream=True)


def test_nan_logits_end_one_request_only():
    with fake_llm(poison=lambda history: b"poison" in bytes(history[1:].astype(np.uint8))) as llm:
        with pytest.raises(NumericalError):
            llm.generate("a poison pill", GREEDY)
        with pytest.raises(NumericalError):
            list(llm.stream("a poison pill", GREEDY))
        replies = llm.generate(["fine", "a poison pill", "good"], GREEDY)
        assert [r.finish_reason for r in replies] == ["length", "error", "length"]
        assert isinstance(replies[1].error, NumericalError)
        assert replies[0].token_ids == tuple(greedy(ids_of("fine"), 12))
        settled(llm)


def test_kv_that_gave_nan_is_not_shared():
    broken = [True]
    with fake_llm(poison=lambda history: broken[0]) as llm:
        with pytest.raises(NumericalError):
            llm.generate("x" * 300, GREEDY)
        broken[0] = False
        reply = llm.generate("x" * 300, GREEDY)
        assert reply.stats.cached_tokens == 0 and reply.token_ids == tuple(greedy(ids_of("x" * 300), 12))


def test_a_kv_budget_too_small_for_the_prompt():
    with fake_llm(pages=2) as llm:
        with pytest.raises(OutOfMemoryError, match="KV pages"):
            llm.generate("x" * 500)
        with pytest.raises(OutOfMemoryError):
            llm.generate("x" * 100, temperature=0, max_tokens=200)
        assert llm.generate("x", GREEDY).finish_reason == "length"


# Cancelling, threads, closing


def test_cancel_while_streaming(llm):
    generation = llm.stream("hello", temperature=0, max_tokens=4000)
    text = next(generation).text
    generation.cancel()
    rest = list(generation)
    assert rest[-1].finish_reason == "cancelled" and generation.reply.text.startswith(text)
    assert len(generation.reply.token_ids) < 4000
    settled(llm)


def test_closing_and_dropping_a_stream_cancels(llm):
    fake_of(llm).delay = 0.002
    with llm.stream("hello", max_tokens=4000) as generation:
        next(generation)
    assert list(generation) == []
    other = llm.stream("hello", max_tokens=4000)
    next(other)
    del other
    for _ in llm.stream("hello", max_tokens=4000):
        break
    settled(llm)


def test_cancel_in_prefill():
    with fake_llm(max_rows=64, delay=0.01, context=60_000) as llm:
        generation = llm.stream("x" * 50_000, max_tokens=5)
        while not fake_of(llm).sizes:
            time.sleep(0.001)
        start = time.perf_counter()
        generation.cancel()
        chunks = list(generation)
        assert [(c.text, c.finish_reason) for c in chunks] == [("", "cancelled")]
        assert time.perf_counter() - start < 0.5 and len(fake_of(llm).sizes) < 100
        settled(llm)


def test_cancel_before_it_starts(llm):
    fake_of(llm).gate = threading.Event()
    first = llm.stream("a", GREEDY)
    second = llm.stream("b", GREEDY)
    second.cancel()
    fake_of(llm).gate.set()
    assert [c.finish_reason for c in second][-1] == "cancelled"
    assert "".join(c.text for c in first) == text_of(greedy(ids_of("a"), 12))


def test_a_thousand_requests_at_once(llm):
    prompts = [f"request {i}" for i in range(1000)]
    replies = llm.generate(prompts, temperature=0, max_tokens=5)
    assert all(r.token_ids == tuple(greedy(ids_of(p), 5)) for p, r in zip(prompts, replies))
    streams = [llm.stream(prompt, temperature=0, max_tokens=5) for prompt in prompts]
    assert ["".join(c.text for c in s) for s in streams] == [r.text for r in replies]
    settled(llm)


def test_many_threads(llm):
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = llm.generate(f"thread {i % 20}", temperature=0, max_tokens=10).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == text_of(greedy(ids_of(f"thread {i % 20}"), 10)) for i in range(100))
    assert max(len(sizes) for sizes in fake_of(llm).sizes) > 1
    settled(llm)


def test_close_ends_what_runs_and_refuses_what_comes():
    llm = fake_llm(delay=0.005)
    device = fake_of(llm)
    generation = llm.stream("hello", max_tokens=4000)
    next(generation)
    llm.close()
    with pytest.raises(EngineStoppedError, match="closed"):
        list(generation)
    with pytest.raises(EngineStoppedError, match="closed"):
        llm.generate("hello")
    assert device.closed and llm.closed
    with pytest.raises(EngineStoppedError):
        llm.embed("hello")
    llm.close()


def test_a_dropped_llm_closes_itself():
    llm = fake_llm()
    llm.generate("hello", GREEDY)
    device, engine = fake_of(llm), llm.engine
    del llm
    assert device.closed and not engine.running


def test_missing_files_and_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError):
        LLM(tmp_path / "none.gguf")
    for values in ({"device": "tpu"}, {"threads": 0}, {"threads": 1.5}, {"host_cores": 5}, {"device_cores": None}):
        with pytest.raises(InvalidRequestError):
            LLM(tmp_path / "none.gguf", **values)
    with pytest.raises(InvalidRequestError, match="model"):
        LLM(5)


def test_names_that_no_file_can_have(tmp_path):
    for name in ("~nobody-of-this-name/m.gguf", str(tmp_path / ("a" * 5000))):
        with pytest.raises(ModelNotFoundError, match=r"\.gguf"):
            LLM(name)


@pytest.mark.parametrize("template", [{"messages": []}, {"tools": []}, {"self": 1}, {1: 2}, "text", [1]])
def test_template_variables_that_cannot_be(llm, template):
    for call in (llm.chat, llm.chat_prompt, llm.session().chat):
        with pytest.raises(InvalidRequestError, match="template"):
            call("hi", template=template)
    with pytest.raises(ChatTemplateError, match="named"):
        llm.chat("hi", template={"name": ["x"]})


def test_a_template_that_renders_nothing():
    with fake_llm(bos=False, chat_template=ChatTemplate("{{ '' }}")) as llm:
        for call in (llm.chat, llm.chat_prompt, llm.session().chat):
            with pytest.raises(ChatTemplateError, match="empty prompt"):
                call("hi")
    with fake_llm(bos=True, chat_template=ChatTemplate("{{ '' }}")) as llm:
        assert llm.chat("hi", GREEDY).token_ids == tuple(greedy([BOS], 12))


def test_a_closed_llm_refuses_every_request():
    llm = fake_llm()
    llm.close()
    for call in (lambda: llm.generate("a", max_tokens=0), lambda: llm.generate("a", early_exit="recompute"),
                 lambda: llm.chat("a"), lambda: llm.embed("a"), lambda: llm.score(["a"])):
        with pytest.raises(EngineStoppedError):
            call()


def test_an_llm_is_not_copied(llm):
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="each process"):
            call(llm)


def test_conversations_make_one_batch():
    with fake_llm() as llm:
        asked = ["one", "two and more"]
        replies = llm.generate([llm.chat_prompt(text) for text in asked], temperature=0, max_tokens=8)
        assert [reply.text for reply in replies] == [llm.chat(text, temperature=0, max_tokens=8).text for text in asked]
