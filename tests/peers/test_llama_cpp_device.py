"""device="llama.cpp": the same calls, the same outcome types, texts of llama.cpp."""
from __future__ import annotations

import numpy as np
import pytest

from edge_runtime import LLM, SamplingParams
from edge_runtime.errors import (
    CorruptModelError,
    DeviceError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
)
from tests.gguf_factory import write_model
from tests.peers.llama_cpp_model import llama_cpp_logits

pytestmark = pytest.mark.peers
GREEDY = SamplingParams(temperature=0, max_tokens=10)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", layers=2, width=64, vocab=300, types="Q8_0")


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, device="llama.cpp", context=512, threads=1) as llm:
        yield llm


def greedy(path, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(llama_cpp_logits(path, ids)[-1].argmax()))
    return ids[-count:]


def test_generate_is_llama_cpps_own_text(llm, path):
    prompt = llm.tokenize("hello world")
    reply = llm.generate("hello world", GREEDY, ignore_eos=True)
    assert list(reply.token_ids) == greedy(path, prompt, 10)
    assert reply.finish_reason == "length" and reply.stats.prompt_tokens == len(prompt)
    assert "".join(c.text for c in llm.stream("hello world", GREEDY, ignore_eos=True)) == reply.text


def test_many_conversations_share_few_slots(llm, path):
    prompts = [[5 + i, 6, 7] * (i + 1) for i in range(9)]
    replies = llm.generate(prompts, GREEDY, ignore_eos=True)
    for prompt, reply in zip(prompts, replies):
        assert list(reply.token_ids) == greedy(path, prompt, 10)
    session = llm.session()
    session.append([9] * 100)
    forks = [session.fork() for _ in range(6)]
    for i, fork in enumerate(forks):
        reply = fork.generate([20 + i], GREEDY, ignore_eos=True)
        assert list(reply.token_ids) == greedy(path, [9] * 100 + [20 + i], 10)


def test_chat_tokenize_and_plan(llm, path):
    assert llm.chat("hi", GREEDY).finish_reason in ("stop", "length")
    with LLM(path, threads=1) as ours:
        for text in ("hello world", "Größe 123 <|im_start|>", "  spaces\n"):
            for parse in (False, True):
                assert llm.tokenize(text, parse_special=parse) == ours.tokenize(text, parse_special=parse)
            assert llm.detokenize(llm.tokenize(text)) == ours.detokenize(ours.tokenize(text))
        assert llm.tokenizer.eog_ids == ours.tokenizer.eog_ids
    assert llm.plan.device == "llama.cpp" and "llama.cpp" in str(llm.plan)
    assert LLM.plan_for(path, device="llama.cpp").architecture == "llama"


def test_refusals(llm, path, tmp_path):
    with pytest.raises(DeviceError, match="embeddings"):
        llm.embed("text")
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "none.gguf", device="llama.cpp")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(CorruptModelError):
        LLM(tmp_path / "bad.gguf", device="llama.cpp")
    with pytest.raises(InvalidRequestError, match="context"):
        LLM(path, device="llama.cpp", context=10**6)
    with pytest.raises(OutOfMemoryError):
        LLM(path, device="llama.cpp", memory_budget=1000)


def test_sessions_load_into_another_process(llm, path, tmp_path):
    session = llm.session()
    session.append([11, 12, 13] * 30)
    session.save(tmp_path / "s")
    with LLM(path, device="llama.cpp", context=512, threads=1) as other:
        loaded = other.load_session(tmp_path / "s")
        reply = loaded.generate([5], GREEDY, ignore_eos=True)
        assert list(reply.token_ids) == greedy(path, [11, 12, 13] * 30 + [5], 10)
    assert np.all(np.array(session.token_ids) == [11, 12, 13] * 30)
