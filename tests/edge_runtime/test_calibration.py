"""Calibration end to end on a device whose exits err as told, and on the CPU with a small random model."""
from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from edge_runtime import calibration, calibration_text
from edge_runtime.calibration import Promise, calibrate, measure
from edge_runtime.errors import CalibrationError, InvalidRequestError, NotEnoughTextError
from edge_runtime.exit_path import HIGHEST, LOWEST, near, safest_to_fastest
from edge_runtime.exit_trace import CRITERIA, Decoded, ExitTrace, Replay, confidences
from edge_runtime.kernels.confidence import confidence_reference
from edge_runtime.llm import LLM
from tests.edge_runtime.exit_device import ExitDevice, exit_llm
from tests.gguf_factory import write_model


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path / "data"))


@pytest.fixture
def rng():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return np.random.default_rng(seed)


def texts(count: int, words: int = 6) -> list[str]:
    return [" ".join(f"w{i * words + j}" for j in range(words)) for i in range(count)]


def sequences(llm: LLM, count: int, max_tokens: int = 20) -> list[Decoded]:
    return calibration_text.replies(llm, list(enumerate(texts(count))), max_tokens=max_tokens)


def made_up(rng: np.random.Generator, count: int, hardness: tuple[float, ...] = (0.6, 0.25),
            exits: tuple[int, ...] = (2, 4)) -> ExitTrace:
    """A trace whose exits are wrong with a probability of hardness times doubt; sequences differ in doubt."""
    lengths = rng.integers(1, 30, count)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    hard = np.repeat(rng.uniform(0.2, 1.8, count), lengths)
    doubt = np.minimum(rng.random((len(exits), starts[-1])) ** 2 * hard, 1)
    wrong = rng.random(doubt.shape) < doubt * np.asarray(hardness)[:, None]
    return ExitTrace(exits, 8, dict.fromkeys(CRITERIA, (1 - doubt).astype(np.float32)), wrong, starts,
                     np.zeros(starts[-1], np.int32))


# Traces

def test_confidences_are_those_of_the_kernels(rng):
    for scale, vocab in ((1, 300), (8, 300), (30, 2), (0.01, 5000)):
        logits = (scale * rng.standard_normal((20, vocab))).astype(np.float32)
        for name, found in confidences(logits).items():
            np.testing.assert_allclose(found, confidence_reference(logits, name), atol=2e-6)


def test_a_trace_holds_what_the_exits_say_after_every_token():
    device = ExitDevice(end_every=24, max_rows=64)
    with exit_llm(device) as llm:
        decoded = sequences(llm, 12)
        trace = Replay(llm).trace(decoded)
    assert trace.sequences == len(decoded) and trace.positions == sum(len(one.rows) for one in decoded)
    for s, one in enumerate(decoded):
        for i in range(len(one.rows)):
            history, at = np.concatenate((one.prompt, one.rows[:i + 1])), trace.starts[s] + i
            full = device.logits(history).argmax()
            for e, layer in enumerate((2, 4)):
                mine = device.at_exit(history, layer)
                assert trace.wrong[e, at] == (mine.argmax() != full)
                margin = confidence_reference(mine, "margin")
                assert trace.confidence["margin"][e, at] == pytest.approx(margin, abs=1e-5)


def test_replies_are_the_models_own_to_their_end_token():
    with exit_llm() as llm:
        decoded = calibration_text.replies(llm, list(enumerate(texts(40))), max_tokens=20)
        for one in decoded[:10]:
            reply = llm.chat(texts(40)[one.document], max_tokens=20, temperature=0.0)
            assert tuple(one.rows) == reply.token_ids[:None if reply.finish_reason == "stop" else -1]
        assert {one.document for one in decoded} <= set(range(40))


def test_long_sequences_are_replayed_in_parts():
    device, small = ExitDevice(end_every=0), ExitDevice(end_every=0, max_rows=16)
    decoded = [Decoded(np.arange(60, 110, dtype=np.int32), np.arange(40, 140, dtype=np.int32))]
    with exit_llm(device) as llm, exit_llm(small) as other:
        one, parts = Replay(llm).trace(decoded), Replay(other).trace(decoded)
    assert np.array_equal(one.wrong, parts.wrong) and one.positions == 100
    assert np.array_equal(one.confidence["entropy"], parts.confidence["entropy"])


def test_leaving_and_the_cap_on_waiting_states(rng):
    trace = made_up(rng, 50)
    left = trace.leaves("max_prob", (0.9, math.inf))
    assert np.array_equal(left == 0, trace.confidence["max_prob"][0] >= np.float32(0.9)) and set(left) == {0, 2}
    assert (trace.leaves("max_prob", (math.inf, math.inf)) == 2).all()
    assert not trace.differs(np.full(trace.positions, 2)).any()
    assert np.array_equal(trace.differs(np.zeros(trace.positions, int)), trace.wrong[0])
    always = np.zeros(trace.positions, np.int64)
    capped = trace.with_cap(always, 3)
    for first, last in zip(trace.starts[:-1], trace.starts[1:]):
        assert [i % 4 == 3 for i in range(last - first)] == [bool(v) for v in capped[first:last] == 2]
    assert trace.losses(np.ones(trace.positions, bool)).tolist() == [1.0] * 50


# The order of candidates

def test_candidates_go_from_safe_to_fast_one_notch_at_a_time(rng):
    trace = made_up(rng, 300)
    path = safest_to_fastest(trace, "max_prob")
    assert path[0] == (math.inf, math.inf) and len(path) > 40
    for before, after in itertools.pairwise(path):
        changed = [(a, b) for a, b in zip(before, after) if a != b]
        assert len(changed) == 1 and changed[0][1] < changed[0][0]
    assert all(LOWEST <= limit <= HIGHEST for limits in path for limit in limits if math.isfinite(limit))
    depth = [trace.depth(trace.leaves("max_prob", limits)).mean() for limits in path]
    risk = [trace.losses(trace.differs(trace.leaves("max_prob", limits))).mean() for limits in path]
    assert all(np.diff(depth) <= 0) and depth[-1] < 2.5
    # By far the most notches cost something; what they cost at first is less than what the last ones cost.
    assert risk[len(risk) // 3] < 0.5 * risk[-1]
    few = near(path, trace, "max_prob", 0.05, (0.2, 0.5, 1.0))
    assert 2 < len(few) <= 4 and few[0] == path[0] and [path.index(limits) for limits in few] == sorted(
        path.index(limits) for limits in few)
    assert 0.03 < trace.losses(trace.differs(trace.leaves("max_prob", few[-1]))).mean() <= 0.05


def test_many_exits_stay_quick(rng):
    exits = tuple(range(1, 8))
    path = safest_to_fastest(made_up(rng, 200, (0.5,) * 7, exits), "entropy")
    assert len(path[0]) == 7 and len(path) > 20


# The promise

def test_calibrated_thresholds_are_stored_and_keep_their_promise_on_other_sequences():
    device = ExitDevice(end_every=24)
    with exit_llm(device) as llm:
        decoded = sequences(llm, 420)
        found = calibrate(llm, decoded[:300], Promise(risk=0.1, criterion="margin"), text="words")
        made = found.calibration
        assert made.thresholds and set(made.thresholds) <= {2, 4} and made.risk == 0.1 and not made.trained
        assert made.sequences == 300 and made.tuning == 75 and made.layers == 8 and made.layers_per_token < 7
        assert made.measured_risk == pytest.approx(found.measured.risk, abs=1e-5)
        assert sum(found.measured.leaving.values()) == pytest.approx(1)
        assert [t.certified for t in found.tested[:-1]] == [True] * (len(found.tested) - 1)
        calibration.save(made)
        assert calibration.load("exit-device", "margin", exits=device.exit_layers) == made.thresholds
        limits = tuple(made.thresholds.get(layer, math.inf) for layer in (2, 4))
        again = measure(llm, decoded[300:], limits, "margin")
        assert again.risk < 0.13 and again.layers_per_token == pytest.approx(made.layers_per_token, abs=0.5)


def test_lower_risks_and_more_confidence_are_slower(rng):
    trace = made_up(rng, 1200)
    decoded = [Decoded(np.ones(1, np.int32), np.ones(1, np.int32), i) for i in range(1200)]
    with exit_llm() as llm:
        depth = {(risk, confidence): calibrate(llm, decoded, Promise(risk, confidence), trace=trace
                                               ).calibration.layers_per_token
                 for risk, confidence in ((0.03, 0.95), (0.06, 0.95), (0.12, 0.95), (0.06, 0.999))}
        bentkus = calibrate(llm, decoded, Promise(0.06, bound="hoeffding_bentkus"), trace=trace).calibration
    assert depth[0.03, 0.95] > depth[0.06, 0.95] > depth[0.12, 0.95]
    assert depth[0.06, 0.999] >= depth[0.06, 0.95]
    assert bentkus.layers_per_token >= depth[0.06, 0.95]


def test_the_promise_holds_in_as_many_calibrations_as_promised(rng):
    """The whole procedure, tuning included, on sequences drawn anew each time; the true risk from a large draw."""
    risk, delta, runs = 0.08, 0.2, 60
    population = made_up(rng, 8000)
    broken = 0
    with exit_llm() as llm:
        for _ in range(runs):
            trace = made_up(rng, 160)
            decoded = [Decoded(np.ones(1, np.int32), np.ones(1, np.int32))] * 160
            made = calibrate(llm, decoded, Promise(risk, 1 - delta), trace=trace).calibration
            limits = tuple(made.thresholds.get(layer, math.inf) for layer in trace.exits)
            differs = population.differs(population.leaves("max_prob", limits))
            broken += population.losses(differs).mean() > risk
    assert broken / runs <= delta + 4 * math.sqrt(delta * (1 - delta) / runs)


def test_propagation_is_measured_as_it_runs():
    with exit_llm() as llm:
        decoded = sequences(llm, 60, max_tokens=8)
        made = calibrate(llm, decoded, Promise(risk=0.3, missing_kv="propagate")).calibration
        assert made.missing_kv == "propagate" and made.thresholds
        limits = tuple(made.thresholds.get(layer, math.inf) for layer in (2, 4))
        # This device's exits do not depend on the KV above: both ways leave alike, but for the cap on waiting states.
        trace = Replay(llm).trace(decoded)
        left = trace.leaves("max_prob", limits)
        seen = measure(llm, decoded, limits, "max_prob", "propagate")
        assert seen.tokens == pytest.approx(trace.differs(left).mean())
        assert seen.layers_per_token == pytest.approx(trace.depth(left).mean())


# What is refused

def test_too_few_sequences_say_how_many_are_missing():
    with exit_llm() as llm:
        promise = Promise(risk=0.05)
        with pytest.raises(NotEnoughTextError) as caught:
            calibrate(llm, sequences(llm, 30), promise)
        assert caught.value.unit == "sequences" and caught.value.need == promise.least > 59
        assert str(promise.least - caught.value.have) in str(caught.value)
        made = calibrate(llm, sequences(llm, 60), Promise(risk=0.25, tuning=0.2))
        assert made.calibration.sequences >= Promise(risk=0.25, tuning=0.2).least


@pytest.mark.parametrize("options", [{}, {"confidence": 0.8}, {"tuning": 0.9}, {"bound": "hoeffding_bentkus"},
                                     {"risk": 0.5, "confidence": 0.5}])
def test_the_least_number_is_enough_and_one_less_is_not(options, rng):
    promise = Promise(**options)
    trace = made_up(rng, promise.least, hardness=(0.0, 0.0))
    decoded = [Decoded(np.ones(1, np.int32), np.ones(1, np.int32))] * promise.least
    with exit_llm() as llm:
        assert calibrate(llm, decoded, promise, trace=trace).calibration.measured_risk == 0
        with pytest.raises(NotEnoughTextError):
            calibrate(llm, decoded[1:], promise)


def test_text_shorter_than_a_context():
    with exit_llm(context=512) as llm:
        with pytest.raises(NotEnoughTextError) as caught:
            calibration_text.passages(llm, ["a" * 500], 100)
        assert (caught.value.have, caught.value.need, caught.value.unit) == (500, 512, "tokens")
        cut = calibration_text.passages(llm, ["a" * 510, "", "bc"], 100)  # a rest of ten tokens is no passage
        assert [number for number, _ in cut] == [0] * 5 + [2] and cut[-1] == (2, "bc")
        with pytest.raises(InvalidRequestError, match="passage_tokens"):
            calibration_text.passages(llm, ["a"], 3)
        with pytest.raises(InvalidRequestError, match="document"):
            calibration_text.replies(llm, cut, prompt="Summarize")


def test_exits_that_are_no_good(rng):
    promise = Promise(risk=0.01)
    trace = made_up(rng, promise.least + 20, hardness=(1e9, 1e9))
    decoded = [Decoded(np.ones(1, np.int32), np.ones(1, np.int32))] * trace.sequences
    with exit_llm() as llm, pytest.raises(CalibrationError, match="no thresholds keep") as caught:
        calibrate(llm, decoded, promise, trace=trace)
    assert "--risk" in str(caught.value) and f"{trace.sequences - round(trace.sequences / 4)} seq" in str(caught.value)


def test_a_model_without_exits():
    with exit_llm(ExitDevice(exits=())) as llm, pytest.raises(InvalidRequestError, match="exit"):
        calibrate(llm, sequences(llm, 5), Promise())


@pytest.mark.parametrize("options", [
    {"risk": 0}, {"risk": 1}, {"risk": -0.1}, {"risk": "much"}, {"risk": math.nan}, {"confidence": 1.0},
    {"confidence": 95}, {"criterion": "layer"}, {"criterion": "luck"}, {"missing_kv": "verify"},
    {"missing_kv": "none"}, {"bound": "hope"}, {"tuning": 0.0}, {"risk": True}, {"risk": 1e-9}, {"seed": -1},
    {"seed": 0.5}])
def test_values_out_of_range(options):
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        Promise(**options)


# On the CPU

def test_on_the_cpu_every_exit_is_the_references_and_propagation_is_its_own_measure(tmp_path, rng):
    from edge_runtime.models.gguf_file import GGUFFile
    from edge_runtime.models.reference import ReferenceModel

    path = write_model(tmp_path / "m.gguf", layers=4, exit_layers=(1, 2), width=64, context_length=256)
    decoded = [Decoded(rng.integers(0, 300, 20).astype(np.int32), rng.integers(0, 300, int(n)).astype(np.int32))
               for n in rng.integers(1, 40, 12)]
    with GGUFFile(path) as file:
        reference = ReferenceModel.load(file)
    with LLM(path, threads=1) as llm:
        replay = Replay(llm)
        assert replay.exits == (1, 2) and replay.layers == 4
        trace = replay.trace(decoded)
        near = []
        for s, one in enumerate(decoded):
            ids, span = np.concatenate((one.prompt, one.rows)), slice(trace.starts[s], trace.starts[s + 1])
            for e, layer in enumerate((1, 2)):
                want = confidence_reference(reference.trace(ids, layers=layer).logits[len(one.prompt):], "max_prob")
                near.append(np.abs(trace.confidence["max_prob"][e, span] - want))
        assert np.mean(np.concatenate(near)) < 0.02
        never, half = (math.inf, math.inf), (float(np.median(trace.confidence["max_prob"][0])), math.inf)
        assert measure(llm, decoded, never, "max_prob", "propagate").tokens == 0
        seen = measure(llm, decoded, half, "max_prob", "propagate")
        exact = measure(llm, decoded, half, "max_prob", trace=trace)
        assert 0.3 < seen.leaving[1] < 0.7 and seen.tokens > 0
        assert abs(seen.leaving[1] - trace.leaves("max_prob", half).tolist().count(0) / trace.positions) < 0.2
        assert exact.tokens > 0 and set(exact.leaving) == {1, 4}
