"""Sampling against slow, obvious versions, and its refusals."""
from __future__ import annotations

import math
import random

import numpy as np
import pytest

from edge_runtime.errors import InvalidRequestError, NumericalError
from edge_runtime.sampling import Sampler, SamplingParams


def sampler(prompt=(1, 2, 3), **values) -> Sampler:
    return Sampler(SamplingParams(**values), np.array(prompt, np.int32))


def reference(logits: np.ndarray, params: SamplingParams, prompt: list[int], reply: list[int]) -> np.ndarray:
    """Probabilities of all tokens, transform after transform, over the sorted vocabulary."""
    scores = [float(x) for x in logits]
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in set(prompt) | set(reply):
        scores[token] = (scores[token] / params.repetition_penalty if scores[token] > 0
                         else scores[token] * params.repetition_penalty)
    for token in set(reply):
        scores[token] -= reply.count(token) * params.frequency_penalty + params.presence_penalty
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.top_k:
        order = order[:params.top_k]
    if params.top_p < 1:
        weights = [math.exp(scores[i] - scores[order[0]]) for i in order]
        kept, held = 0, 0.0
        while held < params.top_p * sum(weights):
            held += weights[kept]
            kept += 1
        order = order[:kept]
    order = [i for i in order if scores[i] >= scores[order[0]] + math.log(params.min_p or 1e-300)]
    out = np.zeros(len(scores))
    for i in order:
        out[i] = math.exp((scores[i] - scores[order[0]]) / params.temperature)
    return out / out.sum()


@pytest.mark.parametrize("values", [
    {}, {"top_p": 1.0}, {"top_k": 5}, {"top_k": 7, "top_p": 0.8}, {"min_p": 0.1, "top_p": 1.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"temperature": 0.3}, {"temperature": 2.0, "top_p": 0.5},
    {"repetition_penalty": 1.3}, {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"logit_bias": {4: 3.0, 9: -math.inf}, "top_k": 20},
])
def test_draws_follow_the_distribution(values):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(50) * 2).astype(np.float32)
    params = SamplingParams(**{"temperature": 1.0, **values})
    prompt, reply = [3, 7, 7, 11], [5, 5, 11, 20]
    expected = reference(logits, params, prompt, reply)
    subject = Sampler(params, np.array(prompt, np.int32))
    subject._counts = {token: reply.count(token) for token in reply} if subject._counting else {}
    subject._seen |= set(reply) if params.repetition_penalty != 1 else set()
    scores = logits if subject._plain else subject._penalized(logits)
    grid = (np.arange(4000) + 0.5) / 4000
    drawn = [subject._draw(scores, int(scores.argmax()), float(u)) for u in grid]
    observed = np.bincount(drawn, minlength=50) / len(grid)
    assert np.abs(observed - expected).max() < 1e-3
    assert not observed[expected == 0].any()


def test_greedy_takes_the_lowest_id_among_equals_and_leaves_the_logits():
    logits = np.array([0, 5, 1, 5], np.float32)
    kept = logits.copy()
    assert sampler(temperature=0).sample(logits)[0] == 1
    assert sampler(temperature=0, logit_bias={1: -1.0}).sample(logits)[0] == 3
    assert sampler(temperature=0, top_k=1).sample(logits)[0] == 1
    assert (logits == kept).all()


def test_top_k_of_one_and_a_tiny_temperature_are_greedy():
    logits = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    for values in ({"top_k": 1}, {"temperature": 1e-8, "top_p": 1.0}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert sampler(**values).sample(logits)[0] == int(logits.argmax()), values


def test_ties_at_the_border_of_top_k_and_top_p():
    logits = np.zeros(100, np.float32)
    subject = sampler(temperature=1.0, top_k=3, top_p=1.0)
    assert {subject.sample(logits)[0] for _ in range(200)} == {0, 1, 2}
    subject = sampler(temperature=1.0, top_p=0.045)
    assert {subject.sample(logits)[0] for _ in range(300)} == {0, 1, 2, 3, 4}


def test_same_seed_same_draws():
    logits = np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)
    draws = [[s.sample(row)[0] for row in logits] for s in (sampler(seed=5), sampler(seed=5), sampler(seed=6))]
    assert draws[0] == draws[1] != draws[2]
    assert sampler(seed=None)._random.random() != sampler(seed=None)._random.random()


def test_penalties_count_what_was_drawn():
    logits = np.array([2.0, 1.9, 1.8, 1.7], np.float32)
    subject = sampler(temperature=0, presence_penalty=1.0)
    assert [subject.sample(logits)[0] for _ in range(4)] == [0, 1, 2, 3]
    subject = sampler(prompt=[0], temperature=0, repetition_penalty=2.0)
    assert [subject.sample(logits)[0] for _ in range(3)] == [1, 2, 3]
    subject = sampler(prompt=[0], temperature=0, frequency_penalty=0.06)
    assert [subject.sample(logits)[0] for _ in range(4)] == [0, 0, 1, 0]


def test_logprobs_are_the_models_own():
    logits = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    expected = logits - math.log(np.exp(logits.astype(np.float64)).sum())
    _, found = sampler(temperature=0, logit_bias={1: -10.0}, logprobs=2).sample(logits)
    assert found.token_id == 2 and found.logprob == pytest.approx(expected[2], abs=1e-6)
    assert [i for i, _ in found.top] == [1, 2]
    assert [p for _, p in found.top] == pytest.approx([expected[1], expected[2]], abs=1e-6)
    assert sampler(temperature=0, logprobs=0).sample(logits)[1].top == ()
    assert len(sampler(temperature=0, logprobs=9).sample(logits)[1].top) == 4
    assert sampler(temperature=0).sample(logits)[1] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_and_infinite_logits(bad, temperature):
    logits = np.zeros(100, np.float32)
    logits[17] = bad
    with pytest.raises(NumericalError, match="1 logits"):
        sampler(temperature=temperature).sample(logits)


def test_forbidding_every_token_is_an_error():
    with pytest.raises(InvalidRequestError, match="at least one token"):
        sampler(logit_bias=dict.fromkeys(range(3), -math.inf)).sample(np.zeros(3, np.float32))


@pytest.mark.parametrize(("name", "value"), [
    ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", math.nan),
    ("temperature", math.inf), ("temperature", "warm"), ("top_k", -1), ("top_k", 2.5), ("top_p", 0), ("top_p", 1.1),
    ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", -1),
    ("repetition_penalty", 0.009), ("repetition_penalty", 101),
    ("presence_penalty", math.nan), ("frequency_penalty", math.inf), ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: math.nan}), ("logit_bias", {1: math.inf}), ("logit_bias", {"a": 1}), ("logit_bias", [1]),
    ("seed", 1.5), ("seed", "x"), ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", 5),
    ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("stop_token_ids", 1.0), ("logprobs", -1),
    ("logit_bias", {1: 1e39}), ("logit_bias", {1: 10**400}), ("presence_penalty", 10**400),
    ("presence_penalty", -1e39), ("frequency_penalty", 1e308), ("stop", "x" * 100_001), ("stop", ["x" * 60_000] * 2),
    ("logprobs", 10**6), ("logprobs", True), ("ignore_eos", "yes"),
])
def test_refusals_name_the_parameter(name, value):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name and isinstance(caught.value, ValueError)


def test_params_take_overrides_and_many_shapes():
    params = SamplingParams(stop="end", stop_token_ids=7, max_tokens=None, seed=np.int64(3), temperature=np.float32(0))
    assert params.stop == ("end",) and params.stop_token_ids == (7,)
    assert SamplingParams.of(params, {"top_k": 3}) == SamplingParams(
        stop=["end"], stop_token_ids=[7], max_tokens=None, seed=3, temperature=0, top_k=3)
    assert SamplingParams.of(None, {"stop": None, "logit_bias": None}) == SamplingParams()
    with pytest.raises(InvalidRequestError, match="temprature"):
        SamplingParams.of(None, {"temprature": 1})
    with pytest.raises(InvalidRequestError, match="params"):
        SamplingParams.of({"temperature": 1}, {})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        params.check_vocabulary(7)
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        SamplingParams(logit_bias={300: 1.0}).check_vocabulary(300)


def test_a_large_vocabulary_and_negative_seeds():
    logits = np.random.default_rng(1).standard_normal(128_256).astype(np.float32)
    subject = sampler(seed=-4, temperature=1.0, top_p=0.9)
    kept = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    border = kept[int(np.searchsorted(np.cumsum(kept), 0.9 * kept.sum()))]
    for _ in range(20):
        assert math.exp(logits[subject.sample(logits)[0]]) >= border * (1 - 1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [
    {"logit_bias": {3: 1e30, 5: 1e30}, "repetition_penalty": 100, "presence_penalty": -1e9},
    {"logit_bias": {3: 1e30, 5: 1e30}, "repetition_penalty": 0.01, "frequency_penalty": 1e9},
    {"logit_bias": {3: -1e39, 5: -10**400, 7: -1e30}, "frequency_penalty": -1e9, "presence_penalty": 1e9},
])
def test_the_largest_values_stay_within_float32(values):
    logits = np.linspace(-30, 30, 50, dtype=np.float32)
    for temperature in (0, 5e-324, 1, 10**400):
        drawn = sampler((3, 5, 7), temperature=temperature, seed=1, **values)
        tokens = [drawn.sample(logits)[0] for _ in range(20)]
        if 3 in values["logit_bias"] and values["logit_bias"][3] > 0:
            assert set(tokens) <= {3, 5}
        else:
            assert not {3, 5} & set(tokens)


def test_seeds_may_be_of_numpy():
    logits = np.zeros(50, np.float32)
    drawn = [[s.sample(logits)[0] for _ in range(20)] for s in (sampler(seed=3), sampler(seed=np.int64(3)))]
    assert drawn[0] == drawn[1]
