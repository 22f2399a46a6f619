"""The scheduler: formulas of the papers, what fits, budgets, hysteresis, and no key ever lost."""
from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.apex import Apex, Choice, Mode, Row, whole_pages
from edge_runtime.offload.cost_model import CostModel, Curves
from edge_runtime.offload.lap_times import LapTimes, Load

LAYERS = 16
FREE = ((1, 0.0), (10**9, 0.0))


def curves(linear: float = 2e-3, device: float = 2e-7, host: float = 5e-7, layers: int = LAYERS, row: float = 0.0,
           link: float = 1e-9, **more) -> Curves:
    """Seconds: of a segment of any number of rows (`row` more for each), of a token's attention on either side, of a
    byte on the link. Handover and head take no time unless told."""
    places = [(rows, tokens) for rows in (1, 64) for tokens in (64, 65536)]
    line = ((1, link), (10**9, link * 10**9))
    given = {"layers": layers, "linear": tuple((rows, linear + rows * row) for rows in (1, 512)), "head": FREE,
             "device_attention": tuple((r, t, r * t * device) for r, t in places),
             "host_attention": tuple((r, t, r * t * host) for r, t in places),
             "device_prompt": tuple((r, t, r * (r + t) * device) for r, t in places),
             "host_prompt": tuple((r, t, r * (r + t) * host) for r, t in places),
             "upload": line, "download": line, "handover": 0.0, "kv_bytes_device": 65536, "kv_bytes_host": 34816,
             "q_bytes": 1, "o_bytes": 1}
    return Curves(**{**given, **more})


def resident(choice: Choice, rows: list[Row]) -> list[Row]:
    """The rows of the next lap, with every copy that the choice asked for."""
    gone = set(choice.evict)
    return [replace(row, device_tokens=min(choice.wanted.get(row.key, 0 if row.key in gone else row.device_tokens),
                                           row.tokens - 1)) for row in rows]


def settled(apex: Apex, rows: list[Row], pool: int) -> Choice:
    """The choice once KV has come to where it is wanted, and the mode had time to change."""
    choice = apex.choose(rows, pool)
    for _ in range(2 * apex.stay + 2):
        rows = resident(choice, rows)
        choice = apex.choose(rows, pool)
    return choice


# The formulas

IDEAL = dict(linear=2e-3, device=1e-8, host=1e-8)


@pytest.mark.parametrize("ratio", [0.2, 1, 5, 50])
@pytest.mark.parametrize("on_device, on_host", [(4, 4), (16, 2), (64, 40)])
def test_weight_bound_laps_are_those_of_apex(on_device, on_host, ratio):
    """DESIGN's T_gl + T_ga, 2 T_gl + T_ga and T_gl + T_ga, and the throughputs over them."""
    times = LapTimes(CostModel(curves(linear=1e-8 * on_device * 4000 * ratio, device=1e-8, host=1e-9, link=0.0)))
    device, host = Load(on_device, on_device * 4000), Load(on_host, on_host * 4000)
    linear, attention = 1e-8 * on_device * 4000 * ratio, 1e-8 * on_device * 4000
    assert times.device_only(device).seconds == pytest.approx(LAYERS * (linear + attention))
    first = Load(on_host // 2, on_host // 2 * 4000)
    second = Load(on_host - on_host // 2, (on_host - on_host // 2) * 4000)
    hidden = on_host * 4000 * 1e-9  # NEO's inequalities: each sub-batch's host attention hides behind the other's work
    assert second.tokens * 1e-9 <= linear + attention and first.tokens * 1e-9 <= attention + linear
    lap = times.pipelined(device, first, second)
    assert hidden <= 2 * linear + attention and lap.seconds == pytest.approx(LAYERS * (2 * linear + attention))
    assert lap.tokens == on_device + on_host
    lap = times.overlap(device, host, min(on_host, LAYERS))
    rate = lap.tokens / lap.seconds
    # A cohort whose attention is done before the device's advances in every layer; else one layer a lap.
    assert lap.seconds == pytest.approx(LAYERS * (linear + attention))
    assert rate >= (on_device + on_host / LAYERS) / lap.seconds * (1 - 1e-9)


@pytest.mark.parametrize("linear_share", [0.25, 0.5, 1, 2, 4, 8])
@pytest.mark.parametrize("host_slower", [2, 4, 5.9, 6.1, 8, 10, 14, 20])
def test_pipelining_beats_device_only_where_equation_6_says(linear_share, host_slower):
    """N_G/N_C < 2 T_gl/T_ga + 3 + T_ga/T_gl, for a host that is busy all the time: N_C = rate of the host's attention,
    N_G = rate of the device's attention while it attends."""
    attention = 64 * 4000 * 1e-8
    linear = linear_share * attention
    times = LapTimes(CostModel(curves(linear=linear, device=1e-8, host=1e-8 * host_slower, link=0.0)))
    device = Load(64, 64 * 4000)
    window = 2 * linear + attention
    rows = window / (4000 * 1e-8 * host_slower)  # what the host attends to meanwhile
    pipelined = times.pipelined(device, Load(rows / 2, rows * 2000), Load(rows / 2, rows * 2000))  # type: ignore[arg-type]
    assert pipelined.seconds == pytest.approx(LAYERS * window)
    alone = times.device_only(device)
    better = pipelined.tokens / pipelined.seconds > alone.tokens / alone.seconds
    # N_C = 1/(4000 host), N_G = 1/(4000 device): their ratio is `host_slower`.
    assert better == (host_slower < 2 * linear / attention + 3 + attention / linear)


def test_overlap_adds_the_hosts_rate():
    """N_C + N_G T_ga / (T_gl + T_ga) when the host is busy all the time."""
    times = LapTimes(CostModel(curves(linear=2e-3, device=1e-8, host=5e-7, link=0.0)))
    device, host = Load(32, 32 * 4000), Load(1000, 1000 * 4000)
    lap = times.overlap(device, host, LAYERS)
    seconds = 2e-3 + 32 * 4000 * 1e-8
    assert lap.bound_by == "host attention"
    assert lap.tokens / lap.seconds == pytest.approx(1 / (4000 * 5e-7 * LAYERS) + 32 / (LAYERS * seconds))


def test_contention_slows_both():
    alone, together = (LapTimes(CostModel(curves(contention_device=factor, contention_host=factor)))
                       for factor in (1, 1.3))
    device, host = Load(8, 8 * 4000), Load(8, 8 * 4000)
    for lap in ("synchronous", "pipelined", "overlap"):
        arguments = {"synchronous": (device, host, 16), "pipelined": (device, Load(4, 16000), Load(4, 16000)),
                     "overlap": (device, host, 8)}[lap]
        assert getattr(together, lap)(*arguments).seconds > getattr(alone, lap)(*arguments).seconds, lap


# Choices

def test_device_only_while_everything_fits():
    apex = Apex(CostModel(curves(linear=2e-3, device=1e-8, host=1e-7)))
    rows = [Row(i, 4000, 3999) for i in range(8)]
    choice = settled(apex, rows, 8 * 4096)
    assert (choice.mode, choice.waiting, choice.host, choice.evict) == (Mode.DEVICE_ONLY, (), (), ())
    assert choice.bound_by == "weights" and choice.tokens == 8


@pytest.mark.parametrize("settings_, mode", [
    # A slow host and a pool with nearly all: hybrid could only lose.
    (dict(linear=1e-4, device=1e-8, host=1e-5), Mode.DEVICE_ONLY),
    # Linears that cost much more than attention: one batch of all, whose attention takes no time.
    (dict(linear=2e-2, device=1e-8, host=2e-8, link=1e-10), Mode.SYNCHRONOUS),
    # A link faster than the host's attention, and memory for what is under way.
    (dict(linear=5e-4, device=1e-9, host=1e-5, link=1e-12), Mode.STREAMING),
])
def test_the_mode_that_suits(settings_, mode):
    rows = [Row(i, 4000 + i) for i in range(32)]
    apex = Apex(CostModel(curves(**settings_)))
    assert settled(apex, rows, 8 * 4096).mode is mode
    best = next(iter(apex.explain().values()))
    assert apex.explain()[mode].rate >= best.rate * 0.95


def test_pipelined_and_overlap_have_their_places():
    """Overlap needs many host rows: each advances a layer a lap. Pipelining pays where few of them take long."""
    apex = Apex(CostModel(curves(linear=2e-3, device=1e-8, host=1e-7)))
    assert settled(apex, [Row(i, 4000) for i in range(128)], 64 * 4096).mode is Mode.OVERLAP
    # Four host rows whose attention takes as long as the linears: two batches of two hide it all.
    apex = Apex(CostModel(curves(linear=8e-3, device=1e-8, host=1e-6)))
    choice = settled(apex, [Row(i, 4000) for i in range(5)], 4096)
    assert choice.mode is Mode.PIPELINED and len(choice.host) == 4 and len(choice.first) in (1, 2)


def test_one_long_sequence_is_split():
    """Both sides attend over half of it, so that attention takes half as long."""
    apex = Apex(CostModel(curves(linear=1e-4, device=1e-6, host=1e-6)))
    row = Row(7, 32000)
    choice = settled(apex, [row], 20000)
    assert choice.mode is Mode.SYNCHRONOUS and choice.split[7] % 64 == 0
    assert abs(choice.split[7] - 16000) <= 64
    assert choice.predicted == pytest.approx(LAYERS * (1e-4 + 16000e-6), rel=0.01)
    assert settled(Apex(CostModel(curves(linear=1e-4, device=1e-6, host=1e-6))), [row], 5000).split == {7: 4992}
    whole = settled(Apex(CostModel(curves(linear=1e-4, device=1e-6, host=1e-6)), split=False), [row], 20000)
    assert (whole.split, whole.host) == ({}, (7,))


def test_what_is_there_stays_and_the_rest_is_brought():
    apex = Apex(CostModel(curves(linear=2e-3, device=1e-8, host=1e-6)))
    rows = [Row(i, 4000, 3999 if i in (5, 9) else 0) for i in range(12)]
    choice = apex.choose(rows, 4 * 4096)
    assert {5, 9} <= set(choice.wanted) and not choice.evict and not {5, 9} & set(choice.bring)
    assert len(choice.wanted) == 4 and set(choice.bring) == set(choice.wanted) - {5, 9}
    assert all(choice.wanted[key] == 4000 for key in choice.bring)


def test_a_pool_that_shrinks_gives_up_copies():
    apex = Apex(CostModel(curves()))
    rows = [Row(i, 4000, 3999) for i in range(4)]
    choice = apex.choose(rows, 2 * 4096)
    assert len(choice.evict) == 2 and not set(choice.evict) & {*choice.device, *choice.wanted}


def test_a_sequence_longer_than_the_pool_gets_its_turn():
    """Device-only would be faster for ever, as others keep coming."""
    apex = Apex(CostModel(curves(linear=1e-4, device=1e-8, host=1e-6)), patience=20, split=False)
    long = Row(0, 30000)
    ran = 0
    for lap in range(40):
        rows = [long, *(Row(1 + lap + i, 500, 499) for i in range(8))]
        choice = apex.choose(rows, 16384)
        ran += 0 in choice.host
        assert (choice.mode is Mode.DEVICE_ONLY) == (lap < 20), lap
    assert ran == 20


def test_who_waits_for_the_device_comes_next():
    """Device-only: places that get free go to the oldest, not to the shortest."""
    apex = Apex(CostModel(curves(linear=1e-4, device=1e-8, host=1e-5)), modes=(Mode.DEVICE_ONLY, Mode.SYNCHRONOUS))
    rows = [Row(0, 3000), Row(1, 1000, 999), Row(2, 500)]
    assert set(apex.choose(rows, 4096).wanted) == {0, 1}
    choice = settled(apex, rows, 4096)
    assert (choice.mode, set(choice.device), choice.waiting) == (Mode.DEVICE_ONLY, {0, 1}, (2,))


# Budgets

def test_interactive_rows_get_their_token_in_time():
    cost = CostModel(curves(linear=1e-4, device=1e-8, host=1e-6, row=1e-5))
    apex = Apex(cost, tbt_seconds=0.010)
    rows = [Row(i, 2000, 1999) for i in range(40)] + [Row(100, 1000, 999, interactive=True)]
    choice = apex.choose(rows, 50 * 2048)
    assert choice.mode in (Mode.DEVICE_ONLY, Mode.SYNCHRONOUS)
    assert 100 in choice.device and 0 < choice.predicted <= 0.010
    assert len(choice.device) + len(choice.host) > 10 and choice.waiting
    one_more = LapTimes(cost).device_only(Load(len(choice.device) + 1, 2000 * len(choice.device) + 1000))
    assert one_more.seconds > 0.010, "batch rows were cut back further than needed"
    assert not set(choice.evict)


def test_too_slow_even_alone():
    apex = Apex(CostModel(curves(linear=2e-3)), tbt_seconds=1e-3)
    rows = [Row(i, 500, 499) for i in range(3)] + [Row(9, 500, 499, interactive=True), Row(8, 500, 0, interactive=True)]
    choice = apex.choose(rows, 8192)
    assert {*choice.device, *choice.host} == {8, 9} and set(choice.waiting) == {0, 1, 2}


def test_interactive_rows_never_fly():
    apex = Apex(CostModel(curves(linear=2e-3, device=1e-8, host=1e-7)))
    rows = [Row(i, 4000) for i in range(128)]
    assert settled(apex, rows, 64 * 4096).mode is Mode.OVERLAP
    rows = resident(apex.choose(rows, 64 * 4096), rows)
    choice = apex.choose([*rows, Row(500, 300, interactive=True)], 64 * 4096)
    assert choice.mode is Mode.SYNCHRONOUS and 500 in choice.host
    assert 500 in choice.bring[:1]
    assert settled(apex, rows, 64 * 4096).mode is Mode.OVERLAP


# Stability

def modes_under_noise(apex: Apex, noise: Callable[[int, Mode], float]) -> list[Mode]:
    """Device-only and overlap a hair apart. noise: of a lap of a mode, what its time is multiplied with."""
    rows, pool, modes = [Row(i, 4000) for i in range(96)], 64 * 4096, []
    for lap in range(400):
        choice = apex.choose(rows, pool)
        rows = resident(choice, rows)
        truth = choice.predicted / apex.cost.correction(choice.kind)
        apex.measured(choice, truth * noise(lap, choice.mode), round(choice.tokens))
        modes.append(choice.mode)
    return modes[1:]  # in the first one KV was still on its way


def test_noise_does_not_make_it_flap():
    seed = random.randrange(10**6)
    print("seed", seed)
    cost = curves(linear=2e-3, device=1e-8, host=4e-7)
    random_ = random.Random(seed)
    modes = modes_under_noise(Apex(CostModel(cost)), lambda lap, mode: random_.uniform(0.8, 1.2))
    changes = lambda modes: sum(one is not two for one, two in pairwise(modes))
    assert changes(modes) <= 5, modes
    trends = lambda lap, mode: random.Random(f"{seed} {mode} {lap // 20}").uniform(0.6, 1.5)  # each mode has its own
    calm = modes_under_noise(Apex(CostModel(cost)), trends)
    restless = modes_under_noise(Apex(CostModel(cost), hysteresis=0.0, stay=0), trends)
    assert changes(calm) < changes(restless)
    for start in range(1, len(modes) - 8):  # a mode that was entered stays, unless device-only was better
        for some in (modes, calm):
            if some[start] is not some[start - 1]:
                assert set(some[start:start + 8]) <= {some[start], Mode.DEVICE_ONLY}


def test_a_model_that_was_wrong_is_corrected():
    """Pipelined laps take twice as long as predicted: another mode takes over, and the error is told."""
    apex = Apex(CostModel(curves(linear=8e-3, device=1e-8, host=1e-6)))
    rows = [Row(i, 4000) for i in range(5)]
    assert settled(apex, rows, 4096).mode is Mode.PIPELINED
    for _ in range(60):
        choice = apex.choose(rows, 4096)
        rows = resident(choice, rows)
        slower = 2.0 if choice.mode is Mode.PIPELINED else 1.0
        truth = choice.predicted / apex.cost.correction(choice.kind) * slower
        apex.measured(choice, truth, round(choice.tokens))
    assert choice.mode is not Mode.PIPELINED
    assert apex.pairs and apex.cost.correction("pipelined") > 1.5


def test_overlap_learns_what_lands():
    """Cohorts miss the device every other time: half the tokens are predicted from then on."""
    apex = Apex(CostModel(curves(linear=2e-3, device=1e-8, host=1e-7)), force=Mode.OVERLAP)
    rows, pool = [Row(i, 4000, 3999 * (i < 64)) for i in range(128)], 64 * 4032
    first = settled(apex, rows, pool)
    assert len(first.device) == 64 and first.tokens > 65
    rate = first.tokens - 64
    owed = 0.0
    for _ in range(200):
        choice = apex.choose(rows, pool)
        owed += rate / 2
        apex.measured(choice, choice.predicted, len(choice.device) + int(owed))
        owed -= int(owed)
    assert choice.tokens - len(choice.device) == pytest.approx(rate / 2, rel=0.1)


# Properties

row_lists = st.lists(st.tuples(st.integers(1, 9000), st.floats(0, 1), st.booleans(), st.integers(-1, LAYERS - 1)),
                     min_size=0, max_size=24)
machines = st.builds(curves, linear=st.floats(1e-5, 1e-2), device=st.floats(1e-9, 1e-6), host=st.floats(1e-9, 1e-6),
                     row=st.floats(0, 1e-4), link=st.floats(0, 1e-8), contention_device=st.floats(1, 2),
                     contention_host=st.floats(1, 2), handover=st.floats(0, 1e-3))


@settings(max_examples=150, deadline=None)
@given(machines, row_lists, st.integers(0, 40000), st.sampled_from([None, *Mode]), st.sampled_from([None, 0.005, 0.1]),
       st.booleans())
@example(curves(), [(9000, 1.0, False, 3)] * 3, 64, Mode.STREAMING, None, True)
def test_every_key_once_and_the_pool_never_overfull(machine, given_rows, pool, force, tbt, interactive):
    rows = [Row(i * 3, tokens, int(share * (tokens - 1)), interactive and urgent, flying)
            for i, (tokens, share, urgent, flying) in enumerate(given_rows)]
    apex = Apex(CostModel(machine), tbt_seconds=tbt, force=force)
    for _ in range(3):
        choice = apex.choose(rows, pool)
        keys = [*choice.device, *choice.host, *choice.split, *choice.waiting]
        assert sorted(keys) == sorted(row.key for row in rows)
        assert choice.predicted >= 0 and choice.tokens >= 0
        assert set(choice.first) <= set(choice.host) and (choice.mode is Mode.PIPELINED or not choice.first)
        by_key = {row.key: row for row in rows}
        assert all(by_key[key].ready for key in choice.device)
        assert all(0 < part <= by_key[key].device_tokens and part < by_key[key].tokens and part % 64 == 0
                   for key, part in choice.split.items())
        assert set(choice.bring) <= set(choice.wanted) and not set(choice.evict) & set(choice.wanted)
        held = {row.key: row.device_tokens for row in rows if row.device_tokens and row.key not in choice.evict}
        held = {key: max(held.get(key, 0), choice.wanted.get(key, 0)) for key in {*held, *choice.wanted}}
        assert sum(whole_pages(tokens) for tokens in held.values()) <= pool
        if force is None:
            if any(row.interactive for row in rows):
                assert choice.mode in (Mode.DEVICE_ONLY, Mode.SYNCHRONOUS)
                assert not {row.key for row in rows if row.interactive} & set(choice.waiting)
                batch = {row.key for row in rows if not row.interactive} - set(choice.waiting)
                assert tbt is None or not batch or choice.predicted <= tbt * (1 + 1e-9)
            elif rows:
                assert choice.device or choice.host or choice.split, "nobody runs"
        rows = [replace(row, flying=-1) for row in resident(choice, rows)]


@settings(max_examples=100, deadline=None)
@given(machines, st.lists(st.integers(1, 9000), min_size=1, max_size=24), st.integers(64, 100000))
def test_never_hybrid_where_device_only_is_predicted_faster(machine, lengths, pool):
    apex = Apex(CostModel(machine), patience=10**6)
    rows = [Row(i, tokens) for i, tokens in enumerate(lengths)]
    for _ in range(12):
        choice = apex.choose(rows, pool)
        alone = choice.considered.get("device-only", 0.0)
        if choice.mode is not Mode.DEVICE_ONLY and not choice.bring:
            assert choice.considered[choice.mode.value] >= alone
        rows = resident(choice, rows)


def test_the_same_answer_twice_and_in_time():
    rows = [Row(i, 1000 + 97 * i, 0) for i in range(64)]
    one, two = (Apex(CostModel(curves())) for _ in range(2))
    assert one.choose(rows, 40000) == two.choose(rows, 40000)
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        one.choose(rows, 40000)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2e-3, "twice the budget, for a busy machine"


def test_wrong_values_are_refused():
    cost = CostModel(curves())
    for arguments in ({"hysteresis": -0.1}, {"stay": -1}, {"expected_tokens": 0}, {"tbt_seconds": 0.0},
                      {"tbt_seconds": float("nan")}, {"hysteresis": float("nan")}):
        with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
            Apex(cost, **arguments)
    with pytest.raises(InvalidRequestError, match="pool_tokens=-1"):
        Apex(cost).choose([Row(0, 1)], -1)
    with pytest.raises(InvalidRequestError, match="different keys"):
        Apex(cost).choose([Row(0, 1), Row(0, 2)], 100)
    assert Apex(cost).choose([], 100) == Choice(Mode.DEVICE_ONLY)
