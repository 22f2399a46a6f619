"""Replies with early exit on the real CPU device: what is promised of each way, and what is refused."""
from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from edge_runtime import LLM, EarlyExit, SamplingParams
from edge_runtime.cli_exits import early_exit_of
from edge_runtime.early_exit import ExitPlan, ExitState, check_exit_layers
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.names import layer_names
from edge_runtime.speculation import Acceptance, Costs, DraftControl
from tests.edge_runtime.llms import fake_llm, settled
from tests.gguf_factory import random_weights, write_model

LAYERS, EXITS, VOCAB = 4, (1, 2), 300
SHAPE = dict(architecture="llama", layers=LAYERS, width=64, heads=4, kv_heads=2, head_size=16, ffn=128, vocab=VOCAB)


def write(folder, above: float, **options):
    """A model whose layers above the exits add `above` times what they would: 0 makes every draft right."""
    weights = random_weights(**SHAPE, scale=2.0)
    for layer in range(1, LAYERS):
        for name in (layer_names(layer).o, layer_names(layer).down):
            weights[name] = weights[name] * np.float32(above)
    return write_model(folder / f"above{above}.gguf", weights=weights, exit_layers=EXITS, types="Q8_0", **SHAPE,
                       **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=[0.0, 0.15, 1.0], ids=["always right", "often right", "seldom right"])
def llm(request, folder):
    with LLM(write(folder, request.param), threads=2) as llm:
        llm.above = request.param
        yield llm


@pytest.fixture(scope="module")
def often(folder):
    with LLM(write(folder, 0.15), threads=2) as llm:
        yield llm


def prompts(count: int, seed: int = 8) -> list[list[int]]:
    print("seed", seed)
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, int(rng.integers(1, 150))).tolist() for _ in range(count)]


@pytest.mark.parametrize("params", [
    dict(temperature=0.0), dict(temperature=1.0, seed=3), dict(temperature=0.8, top_k=20, min_p=0.02, seed=9),
    dict(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.4, seed=1),
    dict(temperature=0.0, logprobs=3)], ids=str)
def test_verify_gives_the_full_models_reply(llm, params, monkeypatch):
    """Token for token, greedy and drawn, alone and in a batch."""
    params = SamplingParams(**params, max_tokens=40, ignore_eos=True)
    texts = prompts(6)
    want = llm.generate(texts, params, early_exit=False)
    for layer in EXITS:
        drafting = EarlyExit("verify", layer=layer)
        together = llm.generate(texts, params, early_exit=drafting)
        for text, one, reply in zip(texts, want, together):
            assert reply.token_ids == one.token_ids and reply.text == one.text and reply.logprobs == one.logprobs
            alone = llm.generate(text, params, early_exit=drafting)
            assert alone.token_ids == one.token_ids
            assert alone.stats.accepted <= alone.stats.drafted
            assert sum(alone.stats.exits.values()) == 39  # the first token comes from the prompt
    if llm.above == 0.0 and params.temperature == 0:
        # One draft each time: how many pay is measured, and depends on what else the machine does.
        monkeypatch.setattr(DraftControl, "choose", lambda self, acceptance, together, most: min(1, most))
        reply = llm.generate(texts[0], params, early_exit=EarlyExit("verify", thresholds={1: 1e-6}))
        # The drafts' head has fewer bits. How long drafts are, and so which share of them is accepted, is a matter of
        # what steps take on this machine.
        assert reply.stats.exits[1] > 10 and reply.stats.accepted >= reply.stats.exits[1]
    settled(llm)


def test_verify_stops_where_the_full_model_does(llm):
    texts = prompts(4, 21)
    for text in texts:
        free = llm.generate(text, temperature=0.0, max_tokens=30, ignore_eos=True, early_exit=False)
        for end in (3, 11, 28):
            token = free.token_ids[end]
            ends = dict(temperature=0.0, max_tokens=30, stop_token_ids=[token])
            assert llm.generate(text, early_exit="verify", **ends).token_ids == llm.generate(
                text, early_exit=False, **ends).token_ids
        for most in (1, 2, 5):
            reply = llm.generate(text, temperature=0.0, max_tokens=most, ignore_eos=True, early_exit="verify")
            assert reply.token_ids == free.token_ids[:most] and reply.finish_reason == "length"


def test_verify_draws_from_the_full_models_distribution(often):
    """Chi-square over the second token of many seeds, with and without drafts: seeds apart, so that nothing but the
    distribution is shared."""
    text, draws = prompts(1, 5)[0][:30], 1500

    def counts(first, early):
        many = [SamplingParams(temperature=1.0, top_k=12, top_p=1.0, max_tokens=2, seed=first + i, ignore_eos=True,
                               early_exit=early) for i in range(draws)]
        return np.bincount([r.token_ids[1] for r in often.generate([text] * draws, many)], minlength=VOCAB)

    drafted = counts(10_000, EarlyExit("verify", thresholds={1: 1e-6}))
    plain = counts(50_000, False)
    both = drafted + plain
    used = both >= 10
    merged = lambda found: np.append(found[used], found[~used].sum())
    drafted, plain, both = merged(drafted), merged(plain), merged(both)
    expected = np.maximum(both / 2, 1e-9)
    statistic = float((((drafted - expected) ** 2 + (plain - expected) ** 2) / expected).sum())
    degrees = len(both) - 1
    # Wilson-Hilferty: the cube root of chi-square / degrees is nearly normal.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    print("chi-square", statistic, "degrees", degrees, "z", z)
    assert degrees >= 8 and z < 3.5


@pytest.mark.parametrize("missing_kv", ["recompute", "propagate"])
def test_thresholds_decide_how_many_leave(llm, missing_kv):
    text = prompts(1, 2)[0]
    ask = dict(temperature=0.0, max_tokens=30, ignore_eos=True)
    full = llm.generate(text, early_exit=False, **ask)
    never = llm.generate(text, early_exit=EarlyExit(missing_kv, thresholds={1: 1 - 1e-9, 2: 1 - 1e-9}), **ask)
    assert never.token_ids == full.token_ids and never.stats.layers_per_token == LAYERS
    always = llm.generate(text, early_exit=EarlyExit(missing_kv, "layer", layer=1), **ask)
    if missing_kv == "propagate":
        assert always.stats.exits == {1: 29} and always.stats.layers_run == 29
    else:  # every ninth token is a full pass, and takes eight along
        assert always.stats.exits == {1: 26, LAYERS: 3}
        assert always.stats.layers_run == 26 + 3 * LAYERS + 3 * 8 * (LAYERS - 1)
    if llm.above == 0.0:
        assert always.token_ids == full.token_ids
    settled(llm)


def test_recompute_leaves_full_passes_as_they_were(often):
    """With one exit that some tokens take, the tokens drawn at full passes are those of a full model that was fed the
    same tokens."""
    text = prompts(1, 3)[0]
    reply = often.generate(text, temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0,
                           early_exit=EarlyExit("recompute", "layer", layer=2, max_pending=3))
    scores = often.score([[*text, *reply.token_ids]])[0][len(text):]
    full = [i for i in range(1, 40) if i % 4 == 0]
    exits = reply.stats.exits
    assert exits == {2: 30, LAYERS: 9}
    for i in full:
        assert reply.logprobs[i].logprob == pytest.approx(scores[i], abs=0.05)


def test_rules_mix_in_one_batch_with_the_results_they_have_alone(often):
    texts = prompts(12, 17)
    rules = [False, "verify", EarlyExit("recompute", thresholds={1: 0.3}), EarlyExit("propagate", thresholds={2: 0.2}),
             EarlyExit("verify", layer=2), EarlyExit("recompute", "margin", thresholds={1: 0.1, 2: 0.1})]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=24, ignore_eos=True, early_exit=rules[i % 6])
              for i in range(12)]
    together = often.generate(texts, params)
    for text, one, reply in zip(texts, params, together):
        assert often.generate(text, one).token_ids == reply.token_ids


def test_preempted_sequences_begin_again_in_full(folder):
    """With pages for a third of the batch everything is preempted and computed again."""
    path = write(folder, 0.0)
    texts = prompts(8, 4)
    rules = ["verify", EarlyExit("recompute", "layer", layer=1), False]
    params = [SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, early_exit=rules[i % 3])
              for i in range(8)]
    with LLM(path, threads=2) as roomy:
        want = [reply.token_ids for reply in roomy.generate(texts, params)]
        page = roomy.engine.cache.pool.layout.page_bytes
    with LLM(path, threads=2) as tight:
        tight.engine._kv_budget_bytes = 10 * page
        tight.engine._reset()
        assert [reply.token_ids for reply in tight.generate(texts, params)] == want
        assert tight.engine.batcher.preemptions > 0
        settled(tight)


@pytest.mark.parametrize("early", ["verify", EarlyExit("recompute", "layer", layer=1),
                                   EarlyExit("propagate", "layer", layer=1)], ids=lambda e: getattr(e, "missing_kv", e))
def test_sessions_go_on_from_a_full_models_kv(early, folder):
    """What a session says after early exits is what it would say with these tokens computed in full, but for the
    rounding of decoded rows."""
    text, ask = prompts(1, 6)[0], dict(temperature=0.0, ignore_eos=True, logprobs=8)
    with LLM(write(folder, 1.0), threads=2) as llm:
        with llm.session() as session:
            first = session.generate(text, max_tokens=20, early_exit=early, **ask)
            again = session.generate([7, 8, 9], max_tokens=1, early_exit=False, **ask)
        whole = llm.generate([*text, *first.token_ids, 7, 8, 9], max_tokens=1, early_exit=False, **ask)
        got, want = dict(again.logprobs[0].top), dict(whole.logprobs[0].top)
        shared = set(got) & set(want)
        assert len(shared) >= 6 and max(abs(got[token] - want[token]) for token in shared) < 0.1


def test_streams_and_cancels(often):
    stream = often.stream(prompts(1)[0], temperature=0.0, max_tokens=200, ignore_eos=True, early_exit="verify")
    pieces = [next(stream) for _ in range(3)]
    stream.cancel()
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled" and pieces
    settled(often)


def test_an_llm_may_have_a_setting_of_its_own(folder):
    with LLM(write(folder, 0.0), early_exit="verify", threads=1) as llm:
        text = prompts(1)[0]
        assert llm.generate(text, max_tokens=12, ignore_eos=True).stats.exits
        assert not llm.generate(text, max_tokens=12, ignore_eos=True, early_exit=False).stats.exits
        assert llm.exit_layers == EXITS


def test_layers_that_were_not_trained_come_with_a_warning(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path))
    path = write_model(folder / "plain.gguf", **SHAPE)
    with pytest.warns(UserWarning, match="was not trained to be left after layers 1,3.*calibrate"):
        llm = LLM(path, exit_layers=[1, 3], threads=1)
    with llm:
        assert llm.generate("ab", max_tokens=8, early_exit="verify", ignore_eos=True).stats.exits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with LLM(write(folder, 0.0), exit_layers=[2], threads=1) as llm:
            assert llm.exit_layers == (2,)


@pytest.mark.parametrize("values, words", [
    (dict(missing_kv="guess"), "guess"), (dict(criterion="mood"), "mood"), (dict(thresholds={1: 1.0}), "below 1"),
    (dict(thresholds={1: 0}), "above 0"), (dict(thresholds={0: 0.5}), "from 1"), (dict(thresholds=0.5), "mapping"),
    (dict(criterion="layer"), "exit layer"), (dict(layer=0), "from 1"), (dict(layer=1.5), "whole number"),
    (dict(max_draft=0), "1 to 16"), (dict(max_draft=17), "1 to 16"), (dict(max_pending=65), "1 to 64"),
    (dict(thresholds={1: "much"}), "below 1"), (dict(thresholds={1: math.nan}), "below 1")], ids=str)
def test_bad_settings_are_refused_by_name(values, words):
    with pytest.raises(InvalidRequestError, match=words):
        EarlyExit(**values)


def test_bad_layers_are_refused_with_the_exits_there_are(often, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path))
    for early, words in ((EarlyExit(layer=3), "an exit of this model: 1, 2"),
                         (EarlyExit("propagate", thresholds={1: 0.5, 9: 0.5}), "an exit of this model"),
                         ("recompute", "edge-runtime calibrate"), ("always", "verify, recompute, propagate"),
                         (True, "EarlyExit"), ({"speed": 1}, "fields"), (7, "EarlyExit")):
        with pytest.raises(InvalidRequestError, match=words):
            often.generate("ab", early_exit=early)
    with fake_llm() as llm, pytest.raises(InvalidRequestError, match="this device"):
        llm.generate("ab", early_exit="verify")
    for layers in ([], [0], [LAYERS], [2, 1], [1, 1], "12", [1.0], [True]):
        with pytest.raises(InvalidRequestError, match="exit_layers"):
            LLM(write(folder, 0.0), exit_layers=layers)
    with pytest.raises(InvalidRequestError, match="one layer"):
        check_exit_layers([1], 1)
    assert check_exit_layers([1, 3], 4) == (1, 3)


def test_settings_come_as_json_has_them():
    early = EarlyExit.of({"missing_kv": "propagate", "thresholds": {"2": 0.5, "1": 0.9}})
    assert early == EarlyExit("propagate", thresholds={1: 0.9, 2: 0.5})
    assert EarlyExit.of("recompute") == EarlyExit("recompute") and EarlyExit.of(None) is None
    for key in ("\u00b2", "9" * 5000):  # digits, for Python, but no numbers
        with pytest.raises(InvalidRequestError, match="thresholds"):
            EarlyExit.of({"thresholds": {key: 0.5}})
    with pytest.raises(InvalidRequestError, match="one threshold for each layer"):
        EarlyExit.of({"thresholds": {"1": 0.5, "01": 0.9}})


def test_options_of_the_command_line():
    assert early_exit_of("recompute", "margin", None, ["1=0.5", "2=.9"]) == EarlyExit("recompute", "margin",
                                                                                       {1: 0.5, 2: 0.9})
    assert early_exit_of(None, "max_prob", None, None) is None
    for options, words in ((("verify", "max_prob", None, ["1=0.5", "1=0.9"]), "the only one of layer 1"),
                           (("verify", "max_prob", None, ["1"]), "LAYER=CONFIDENCE"),
                           ((None, "margin", None, None), "--exit-criterion"),
                           ((None, "max_prob", 2, None), "--exit-layer")):
        with pytest.raises(InvalidRequestError, match=words):
            early_exit_of(*options)


def test_states_that_wait_are_counted_to_the_next_full_pass():
    plan = ExitPlan.of(EarlyExit("recompute", thresholds={2: 0.5}, max_pending=2), (1, 2), 4)
    state = ExitState(plan, 32, 8)
    assert state.rule().limits == (math.inf, 0.5)
    state.note(2, 10)
    state.note(2, 11)
    assert state.pending == 2 and state.exact_tokens(12) == 10
    assert state.rule().limits[1] > 1  # the cap: nothing leaves
    state.note(4, 12)
    assert state.pending == 0 and state.exact_tokens(13) == 13
    assert state.stats.layers_run == 2 + 2 + 4 + 2 * (4 - 2)


def test_draft_lengths_follow_acceptance_and_cost():
    control = DraftControl()
    for rows in (1, 3, 5, 9):
        control.note(2, rows - 1, 1, rows, 100.0)  # while it compiles
        for _ in range(20):
            control.note(2, rows - 1, 1, rows, 1.0 + 0.2 * (rows - 1))
    good, bad = Acceptance(), Acceptance()
    for _ in range(50):
        good.note(8, 8, 8)
        bad.note(4, 0, 4)
    assert control.choose(good, 1, 8) == 8 and control.choose(good, 1, 3) == 3
    assert control.choose(bad, 1, 8) == 0
    for _ in range(70):
        bad.note(0, 0, 0)
    assert control.choose(bad, 1, 8) == 2  # tried again after a while
    middling = Acceptance()
    for _ in range(60):
        middling.note(4, 2, 4)
    assert 1 <= control.choose(middling, 1, 8) <= 5
    unsure = Acceptance()
    for _ in range(40):
        unsure.note(0, 0, 8)  # the exit never dares: each time its head was read for nothing
    assert control.choose(unsure, 1, 8) == 0
    costs = Costs()
    for rows in (2, 9, 2, 9):
        costs.note(rows, 10 + rows)
    assert costs.predict(5) == pytest.approx(15, rel=0.2)
