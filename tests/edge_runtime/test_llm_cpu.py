"""The whole way on the real CPU device, with a small random model."""
from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest

from edge_runtime import LLM, SamplingParams
from edge_runtime.errors import (
    ContextLengthError,
    CorruptModelError,
    EngineStoppedError,
    OutOfMemoryError,
    SessionFileError,
)
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from tests.edge_runtime.test_engine import kill
from tests.gguf_factory import write_model

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", layers=2, width=64, heads=4, kv_heads=2, vocab=400,
                       types="Q8_0", scale=2.0)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, threads=2) as llm:
        yield llm


def prompts(count: int) -> list[list[int]]:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 400, int(rng.integers(1, 300))).tolist() for _ in range(count)]


def test_batched_equals_alone(llm):
    texts = prompts(24)
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=16, ignore_eos=True) for i in range(24)]
    together = llm.generate(texts, params)
    for text, one, reply in zip(texts, params, together):
        assert llm.generate(text, one).token_ids == reply.token_ids


def test_cached_prefixes_and_fresh_engines_give_the_same_text(llm, path):
    shared = prompts(1)[0] + list(range(100, 300))
    first = [llm.generate([*shared, i], GREEDY).token_ids for i in range(5)]
    assert llm.generate([*shared, 9], GREEDY).stats.cached_tokens >= 192
    with LLM(path, threads=1) as fresh:
        assert [fresh.generate([*shared, i], GREEDY).token_ids for i in reversed(range(5))] == first[::-1]


def test_preempted_sequences_give_the_same_text(llm, path):
    texts = [list(range(i, i + 100)) for i in range(6)]
    expected = [r.token_ids for r in llm.generate(texts, GREEDY, max_tokens=120)]
    with LLM(path, threads=2, context=256) as small:
        page = small.engine.cache.pool.page_bytes
        small.engine._kv_budget_bytes = 11 * page
        small.engine._reset()
        assert [r.token_ids for r in small.generate(texts, GREEDY, max_tokens=120)] == expected
        assert small.engine.batcher.preemptions > 0


def test_sessions_fork_save_and_load(llm, path, tmp_path):
    text = prompts(1)[0] + [7] * 70
    session = llm.session()
    session.append(text)
    assert session.fork().generate([5], GREEDY).token_ids == llm.generate([*text, 5], GREEDY).token_ids
    session.save(tmp_path / "s")
    with LLM(path, threads=2) as other:
        loaded = other.load_session(tmp_path / "s")
        reply = loaded.generate([5], GREEDY)
        assert reply.token_ids == llm.generate([*text, 5], GREEDY).token_ids
        assert reply.stats.cached_tokens == len(text)
    stranger = write_model(tmp_path / "other.gguf", layers=2, width=64, heads=4, kv_heads=2, vocab=400, types="Q8_0",
                           seed=1)
    with LLM(stranger, threads=2) as other, pytest.raises(SessionFileError, match="another model"):
        other.load_session(tmp_path / "s")


def test_embeddings_are_the_references_hidden_states(llm, path):
    text = "a few words to embed"
    with GGUFFile(path) as file:
        states = ReferenceModel.load(file).trace(llm.tokenize(text)).normed
    found = llm.embed(text, normalize=False)
    assert np.linalg.norm(found - states.mean(axis=0)) < 0.05 * np.linalg.norm(states.mean(axis=0))
    assert np.allclose(llm.embed([text, "other"])[0], found / np.linalg.norm(found), atol=1e-6)


def test_chat_streams_text(llm):
    chunks = list(llm.chat("hello", GREEDY, stream=True))
    assert "".join(c.text for c in chunks) == llm.chat("hello", GREEDY).text
    assert chunks[-1].finish_reason == "length" and chunks[-1].stats.completion_tokens == 16


def test_plans_and_refusals(llm, path, tmp_path):
    plan = LLM.plan_for(path)
    assert (plan.context, plan.model_context) == (2048, 2048) and plan.weights_bytes > 0
    assert llm.plan.kv_page_bytes == llm.engine.cache.pool.page_bytes
    assert LLM.plan_for(path, kv="fp16").kv_page_bytes > plan.kv_page_bytes
    for call in (LLM, LLM.plan_for):
        with pytest.raises(OutOfMemoryError, match="memory_budget"):
            call(path, memory_budget=1 << 20)
    with pytest.raises(ContextLengthError):
        llm.generate([1] * 2048)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptModelError):
        LLM(cut)


def test_a_thousand_requests_and_a_killed_thread(path):
    with LLM(path, threads=2) as llm:
        texts = [[i % 400, 5, i // 400] for i in range(1000)]
        replies = llm.generate(texts, GREEDY, max_tokens=3)
        assert len(replies) == 1000 and all(len(r.token_ids) == 3 for r in replies)
        stream = llm.stream(texts[7], GREEDY, max_tokens=1500)
        next(stream)
        kill(llm.engine._thread)
        with pytest.raises(EngineStoppedError):
            list(stream)
        assert llm.generate(texts[7], GREEDY, max_tokens=3).token_ids == replies[7].token_ids


def test_scores_are_the_reference_models(path, llm):
    ids = prompts(1)[0] * 3
    with GGUFFile(path) as file:
        logits = ReferenceModel.load(file).forward(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    [scores] = llm.score([ids])
    off = np.abs(scores[1:] - expected[np.arange(len(ids) - 1), ids[1:]])
    assert off.mean() < 0.06 and off.max() < 0.8  # rounding of activations; logits here have a deviation of several


def test_closing_frees_the_weights(tmp_path):
    bare = write_model(tmp_path / "bare.gguf", layers=2, width=64, heads=4, kv_heads=2, vocab=400, types="Q8_0",
                       chat_template=None)
    llm = LLM(bare, threads=2)
    llm.generate("a", GREEDY)
    device = weakref.ref(llm._loaded.device)
    llm.close()
    gc.collect()
    assert device() is None and llm.closed
