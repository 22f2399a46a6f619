"""Early exit on the CPU device: the rows that leave, the holes they leave behind, drafts and their check."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.devices.base import Draft, ExitRule, SequenceSlice, Step
from edge_runtime.errors import DeviceError
from edge_runtime.kernels.confidence import confidence_reference
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.offload.page_table import PageTable
from tests.devices.steps import Driver
from tests.gguf_factory import write_model

EXITS = (1, 2, 4)
LAYERS = 6
MODELS = {
    "llama": dict(),
    "qwen2, 7 query heads a kv head": dict(architecture="qwen2", heads=7, kv_heads=1, head_size=32, width=224,
                                           tied=False),
    "qwen3, float matrices": dict(architecture="qwen3", head_size=64, width=96, heads=4, kv_heads=2, types="F16"),
    "widths that 32 does not divide": dict(types="F32", width=100, heads=5, head_size=20, kv_heads=5, ffn=130),
}


def model(folder: Path, **shape) -> Path:
    return write_model(folder / "m.gguf", **{"layers": LAYERS, **shape})


def never() -> tuple[float, ...]:
    return (math.inf,) * len(EXITS)


def only(layer: int, limit: float = -math.inf) -> tuple[float, ...]:
    return tuple(limit if exit == layer else math.inf for exit in EXITS)


class Decoder:
    """One sequence decoded token by token with a rule, as the engine does it."""

    def __init__(self, driver: Driver, capacity: int = 16):
        self.driver, self.table = driver, driver.table()
        self.held = np.zeros((capacity, driver.device.state_width), np.float32)
        self.pending = 0

    def prompt(self, ids: np.ndarray) -> None:
        self.driver.run(self.driver.slice(self.table, ids, True, "last"))

    def slice(self, ids, criterion: str, limits, propagate: bool = False) -> SequenceSlice:
        s = self.driver.slice(self.table, np.asarray(ids, np.int32), False)
        rule = ExitRule(criterion, tuple(limits), propagate, None if propagate else self.held, self.pending)
        return SequenceSlice(s.token_ids, s.position, s.pages, "all", False, False, rule)

    def took(self, layers: int) -> None:
        self.pending = self.pending + 1 if layers < LAYERS else 0

    def step(self, token: int, criterion: str, limits, propagate: bool = False) -> tuple[np.ndarray, int]:
        result = self.driver.device.run(Step((self.slice([token], criterion, limits, propagate),)))
        layers = int(result.exits[0])
        if not propagate:
            self.took(layers)
        return result.logits[0].copy(), layers


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 300, 90)


@pytest.mark.parametrize("name", MODELS)
def test_every_exit_gives_the_heads_logits_of_its_layer(name, tmp_path, ids):
    with Driver(model(tmp_path, **MODELS[name]), kv="fp16", exits=EXITS) as driver:
        reference = ReferenceModel.load(driver.file)
        for exit in EXITS:
            want = reference.trace(ids, layers=exit).logits
            decoder = Decoder(driver, 100)
            got = np.stack([decoder.step(token, "layer", only(exit))[0] for token in ids])
            assert np.abs(got - want).max() < 0.25 * want.std()
            assert decoder.pending == len(ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_rule_that_never_lets_go_changes_no_bit(name, tmp_path, ids):
    with Driver(model(tmp_path, **MODELS[name]), exits=EXITS) as driver:
        want, decoder = driver.decode(ids), Decoder(driver)
        for i, token in enumerate(ids):
            logits, layers = decoder.step(token, "max_prob", never())
            assert layers == LAYERS and np.array_equal(logits, want[i])


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "entropy"])
def test_rows_leave_where_their_confidence_reaches_the_limit(criterion, tmp_path, ids):
    with Driver(model(tmp_path), exits=EXITS) as driver:
        decoder, confidences = Decoder(driver, 100), []
        for token in ids[:60]:
            confidences.append(confidence_reference(decoder.step(token, "layer", only(2))[0], criterion))
        limit = float(np.median(confidences))
        left = []
        decoder = Decoder(driver, 100)
        for token in ids[:60]:
            # Without a full pass the states below stay the same, so the confidences do.
            s = decoder.slice([token], criterion, only(2, limit))
            result = driver.device.run(Step((s,)))
            left.append(int(result.exits[0]) == 2)
            decoder.pending += 1
        sure = np.abs(np.array(confidences) - limit) > 1e-5
        assert np.array_equal(np.array(left)[sure], (np.array(confidences) > limit)[sure])
        assert 20 < sum(left) < 40


def test_waiting_states_join_the_next_full_pass_and_leave_nothing_to_see(tmp_path, ids):
    """After tokens that left at any exits, a full pass gives the bits that it gives without early exit."""
    seed = 11
    print("seed", seed)
    rng = np.random.default_rng(seed)
    with Driver(model(tmp_path), exits=EXITS) as driver:
        want, decoder = driver.decode(ids), Decoder(driver)
        full = 0
        for i, token in enumerate(ids):
            exit = int(rng.choice([0, *EXITS])) if decoder.pending < 12 else 0
            # All exits from the lowest on are named, so that states always wait from the same layer.
            limits = tuple(-math.inf if exit and layer >= exit else 1.5 for layer in EXITS)
            s = decoder.slice([token], "layer" if exit else "max_prob", limits)
            if exit:
                s = SequenceSlice(s.token_ids, s.position, s.pages, "all", False, False,
                                  ExitRule("entropy", limits, False, decoder.held, decoder.pending))
            result = driver.device.run(Step((s,)))
            decoder.took(int(result.exits[0]))
            assert int(result.exits[0]) == (exit or LAYERS)
            if not exit:
                full += 1
                assert np.array_equal(result.logits[0], want[i])
        assert full > 10


def test_the_layers_above_take_k_and_v_of_what_left(tmp_path, ids):
    """`propagate` beside the oracle, whose rows are frozen where they leave."""
    seed = 4
    print("seed", seed)
    left = np.random.default_rng(seed).choice([*EXITS, LAYERS], len(ids))
    with Driver(model(tmp_path), kv="fp16", exits=EXITS) as driver:
        want = ReferenceModel.load(driver.file).trace(ids, exits=left).logits
        decoder = Decoder(driver)
        for i, token in enumerate(ids):
            limits = only(left[i]) if left[i] < LAYERS else never()
            logits, layers = decoder.step(token, "layer" if left[i] < LAYERS else "margin", limits, True)
            assert layers == left[i]
            assert np.abs(logits - want[i]).max() < 0.25 * want.std()
        plain = ReferenceModel.load(driver.file).forward(ids)
        assert np.abs(plain[-1] - want[-1]).max() > np.abs(logits - want[-1]).max()


def test_rows_that_leave_together_are_as_alone(tmp_path, ids):
    with Driver(model(tmp_path), exits=EXITS) as driver:
        alone = Decoder(driver)
        want = [alone.step(token, "layer", only(2), True)[0] for token in ids]
        together = Decoder(driver)
        result = driver.device.run(Step((together.slice(ids, "layer", only(2), True),)))
        assert set(result.exits.tolist()) == {2} and np.array_equal(result.logits, np.stack(want))


def test_a_step_mixes_leaving_staying_joining_and_prompts(tmp_path):
    """Every row of random mixed steps has the bits that it has in steps of its own."""
    seed = 7
    print("seed", seed)
    rng = np.random.default_rng(seed)
    with Driver(model(tmp_path), exits=EXITS) as driver:
        def moves(length):
            return [(int(token), int(rng.choice([0, 1, 2, 4]))) for token in rng.integers(0, 300, length)]

        def rule_of(exit, kind):
            if kind == 0:
                return None
            limits = tuple(-math.inf if exit and layer >= exit else math.inf if not exit else 1.5 for layer in EXITS)
            return ("max_prob", (1.5, *limits[1:]) if exit != 1 else limits, kind == 2)

        plans = [(kind, rng.integers(0, 300, int(rng.integers(3, 80))), moves(14)) for kind in (0, 1, 2, 1, 2, 1)]

        def run(decoder, kind, token, exit):
            rule = rule_of(exit, kind)
            s = decoder.slice([token], "max_prob", never(), kind == 2)
            exit_rule = None if rule is None else ExitRule(rule[0], rule[1], rule[2],
                                                           None if kind == 2 else decoder.held, decoder.pending)
            return SequenceSlice(s.token_ids, s.position, s.pages, "last", False, False, exit_rule)

        alone = []
        for kind, prompt, steps in plans:
            decoder, rows = Decoder(driver, 20), []
            decoder.prompt(prompt)
            for token, exit in steps:
                result = driver.device.run(Step((run(decoder, kind, token, exit),)))
                layers = LAYERS if result.exits is None else int(result.exits[0])
                if kind == 1:
                    decoder.took(layers)
                rows.append((result.logits[0].copy(), layers))
            alone.append(rows)
        want_prompt = driver.prompt(np.arange(100))
        decoders = [Decoder(driver, 20) for _ in plans]
        for decoder, (_, prompt, _) in zip(decoders, plans):
            decoder.prompt(prompt)
        for at in range(14):
            slices, order = [], rng.permutation(len(plans))
            extra, cut = driver.table(), int(rng.integers(1, 100))
            for i in order:
                kind, _, steps = plans[i]
                slices.append(run(decoders[i], kind, *steps[at]))
            where = int(rng.integers(0, len(slices) + 1))
            slices.insert(where, driver.slice(extra, np.arange(cut), True, "all"))
            result = driver.device.run(Step(tuple(slices)))
            rows = [r for r in range(len(result.logits)) if not where <= r < where + cut]
            assert np.array_equal(result.logits[where:where + cut], want_prompt[:cut])
            for row, i in zip(rows, order):
                logits, layers = alone[i][at]
                assert np.array_equal(result.logits[row], logits), (at, i, plans[i][0])
                if plans[i][0]:
                    assert result.exits[row] == layers
                if plans[i][0] == 1:
                    decoders[i].took(layers)
            extra.release()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_check_of_drafts_gives_the_full_models_bits(name, threads, tmp_path, ids):
    with Driver(model(tmp_path, **MODELS[name]), exits=EXITS, threads=threads) as driver:
        table, want = driver.table(), {}

        def full(tokens: tuple[int, ...]) -> np.ndarray:
            if tokens not in want:
                want[tokens] = driver.decode(np.array(tokens))[-1]
            return want[tokens]

        tokens = list(map(int, ids[:61]))
        driver.run(driver.slice(table, np.array(tokens[:-1]), False, "last"))
        for most in (3, 0, 7, 2):
            table.reserve(most + 1)
            found = driver.device.speculate(2, [Draft(tokens[-1], table.length, table.addresses, most)])[0]
            assert len(found.tokens) == most and found.logits.shape == (most + 1, driver.device.vocab_size)
            logits, drafts = found.logits.copy(), found.tokens.tolist()
            trail = list(tokens)
            for k in range(most + 1):
                assert np.array_equal(logits[k], full(tuple(trail)))
                if k < most:
                    trail.append(drafts[k])
            accepted = most // 2
            table.advance(1 + accepted)
            tokens += [*drafts[:accepted], int(logits[accepted].argmax())]


def test_drafts_are_the_exits_own_choice_and_stop_where_it_is_unsure(tmp_path, ids):
    with Driver(model(tmp_path), exits=EXITS) as driver:
        table = driver.table()
        driver.run(driver.slice(table, ids, False, "last"))
        table.reserve(9)
        draft = lambda stop: driver.device.speculate(2, [Draft(5, table.length, table.addresses, 8, stop)])[0].tokens
        drafts = draft(0.0)
        alone, token, sure = Decoder(driver, 200), 5, []
        for i in ids:
            alone.step(int(i), "layer", only(2))
        for expected in drafts:
            logits = alone.step(token, "layer", only(2))[0]
            token = int(logits.argmax())
            sure.append(float(confidence_reference(logits, "max_prob")))
            assert token == expected
        limit = (min(sure) + sorted(sure)[1]) / 2
        assert np.array_equal(draft(limit), drafts[:int(np.argmin(sure))])
        assert len(draft(1.0)) == 0


def test_many_sequences_draft_together_as_alone(tmp_path):
    seed = 13
    print("seed", seed)
    rng = np.random.default_rng(seed)
    with Driver(model(tmp_path), exits=EXITS) as driver:
        tables: list[PageTable] = []
        for length in (3, 63, 64, 130, 200):
            tables.append(driver.table())
            driver.run(driver.slice(tables[-1], rng.integers(0, 300, length), True, "last"))
            tables[-1].reserve(8)
        drafts = [Draft(int(rng.integers(0, 300)), t.length, t.addresses, int(rng.integers(0, 7)),
                        float(rng.choice([0.0, 0.02]))) for t in tables]
        alone = []
        for d in drafts:
            found = driver.device.speculate(1, [d])[0]
            alone.append((found.tokens, found.logits.copy()))
        for found, (tokens, logits) in zip(driver.device.speculate(1, drafts), alone):
            assert np.array_equal(found.tokens, tokens) and np.array_equal(found.logits, logits)


def test_bad_rules_are_refused(tmp_path, ids):
    with pytest.raises(DeviceError, match="exits"):
        Driver(model(tmp_path), exits=(2, 6))
    with Driver(model(tmp_path), exits=EXITS) as driver:
        table = driver.table()
        s = driver.slice(table, ids[:1], False)

        def run(rule, **changes):
            values = dict(token_ids=s.token_ids, position=0, pages=s.pages, logits="last", exit=rule) | changes
            driver.device.run(Step((SequenceSlice(**values),)))

        held = np.zeros((2, driver.device.state_width), np.float32)
        for rule, changes, words in (
                (ExitRule("luck", never(), True), {}, "luck"),
                (ExitRule("margin", (0.5,), True), {}, "limits"),
                (ExitRule("margin", never()), {}, "held"),
                (ExitRule("margin", never(), False, held[:, :-1]), {}, "held"),
                (ExitRule("margin", never(), False, held, 2), {}, "waiting"),
                (ExitRule("margin", never(), True), dict(prompt=True), "prompt"),
                (ExitRule("margin", never(), True), dict(logits="none"), "logits"),
                (ExitRule("margin", never(), True), dict(token_ids=ids[:2].astype(np.int32)), "rows")):
            with pytest.raises(DeviceError, match=words):
                run(rule, **changes)
        with pytest.raises(DeviceError, match="draft layer 3"):
            driver.device.speculate(3, [Draft(1, 0, s.pages, 1)])
