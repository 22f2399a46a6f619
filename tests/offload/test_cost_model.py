"""Interpolation against NumPy, what holds for all costs, contention, and the running correction."""
from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ProfileError
from edge_runtime.offload.cost_model import BOUND, COMMON_BOUND, CostModel
from edge_runtime.offload.curves import Curves, Grid, Line

ROWS = (1, 2, 8, 32, 128, 512)
TOKENS = (64, 512, 4096, 32768)


def curves(**changed) -> Curves:
    """A device that is four times as fast as the host."""
    def decode(rate):
        return tuple((b, t, 2e-5 + b * (1e-6 + t * rate)) for b in (1, 4, 16) for t in TOKENS)

    def prompt(rate):
        return tuple((n, before, 1e-5 + n * rate * (before + n / 2))
                     for n in (16, 128, 512) for before in (0, 1024, 8192))

    base = Curves(
        layers=16, linear=tuple((n, 1e-3 + 2e-5 * max(0, n - 8)) for n in ROWS), head=((1, 2e-3), (64, 3e-3)),
        device_attention=decode(5e-9), host_attention=decode(2e-8),
        device_prompt=prompt(2e-9), host_prompt=prompt(8e-9),
        upload=((4096, 1e-5), (1 << 20, 1e-4), (1 << 26, 6e-3)), download=((4096, 2e-5), (1 << 20, 2e-4)),
        handover=3e-5, kv_bytes_device=65536, kv_bytes_host=34816, q_bytes=12288, o_bytes=8192)
    return dataclasses.replace(base, **changed)


def lines(draw_zero=False):
    xs = st.lists(st.integers(1, 100_000), min_size=2, max_size=8, unique=True).map(sorted)
    return xs.flatmap(lambda x: st.tuples(st.just(x), st.lists(
        st.floats(0, 10), min_size=len(x), max_size=len(x)).map(sorted)))


@given(lines(), st.floats(0, 1))
def test_a_line_is_numpys_interpolation(line, share):
    xs, ys = line
    x = xs[0] + share * (xs[-1] - xs[0])
    assert Line(list(zip(xs, ys)))(x) == pytest.approx(np.interp(x, xs, ys), rel=1e-9, abs=1e-12)
    from_zero = Line(list(zip(xs, ys)), through_zero=True)
    assert from_zero(x * share) == pytest.approx(np.interp(x * share, [0, *xs], [0, *ys]), rel=1e-9, abs=1e-12)


@given(lines(), st.floats(1, 50))
def test_beyond_the_last_point_the_last_line_goes_on(line, times):
    xs, ys = line
    x = xs[-1] * times
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    assert Line(list(zip(xs, ys)))(x) == pytest.approx(ys[-1] + slope * (x - xs[-1]), rel=1e-9, abs=1e-9)


def test_noise_at_the_ends_never_turns_a_line_down_or_below_zero():
    falling = Line([(10, 1.0), (20, 3.0), (30, 2.0)])
    assert falling(300) == 2.0
    assert falling(1) == 0.0  # 1 - 9 * 0.2, cut off
    assert Line([(10, 3.0), (20, 1.0)])(1) == 3.0
    assert Line([(10, 2.0)])(1) == 2.0 and Line([(10, 2.0)])(30) == 6.0
    assert Line([(10, 2.0)], through_zero=True)(5) == 1.0


def test_a_grid_is_bilinear_and_its_rows_may_have_places_of_their_own():
    grid = Grid(((2, 100, 1.0), (2, 300, 3.0), (4, 100, 5.0), (4, 200, 6.0)))
    assert grid(2, 200) == pytest.approx(2.0)
    assert grid(3, 200) == pytest.approx(4.0)
    assert grid(3, 300) == pytest.approx((3.0 + 7.0) / 2)  # of four rows there is no point at 300
    assert grid(1, 200) == pytest.approx(1.0)
    assert grid(6, 200) == pytest.approx(10.0)
    assert grid(0, 200) == 0.0
    scipy = pytest.importorskip("scipy.interpolate")
    generator = np.random.default_rng(seed := 5)
    values = generator.random((5, 4))
    reference = scipy.RegularGridInterpolator(((0, *ROWS[:4]), TOKENS), np.vstack([np.zeros(4), values[:4]]))
    ours = Grid(tuple((b, t, values[i, j]) for i, b in enumerate(ROWS[:4]) for j, t in enumerate(TOKENS)))
    for rows, tokens in zip(generator.uniform(0, 32, 200), generator.uniform(64, 32768, 200)):
        assert ours(rows, tokens) == pytest.approx(reference([[rows, tokens]])[0]), f"seed {seed}"


def test_rows_with_a_single_place_grow_as_those_before_them():
    grid = Grid(((1, 64, 1.0), (1, 1064, 3.0), (1, 2064, 4.0), (4, 64, 2.0), (16, 64, 3.0), (16, 1064, 50.0)))
    assert grid(4, 64) == pytest.approx(2.0)
    assert grid(4, 1064) == pytest.approx(2.0 + 4 * 2.0)
    assert grid(4, 3064) == pytest.approx(2.0 + 4 * 4.0)
    assert grid(16, 1064) == pytest.approx(50.0)
    assert Grid(((4, 64, 2.0), (8, 64, 4.0)))(4, 128) == pytest.approx(4.0)  # nothing to go by but itself


@settings(deadline=None)
@given(st.lists(st.integers(1, 200_000), max_size=40), st.just(0) | st.floats(1e-3, 2000), st.integers(0, 1 << 30))
def test_costs_are_never_negative_and_zero_for_no_rows(tokens, rows, nbytes):
    cost = CostModel(curves())
    for seconds in (cost.device_attention(tokens), cost.host_attention(tokens), cost.linear(rows), cost.head(rows),
                    cost.device_prompt(rows, nbytes % 100_000), cost.host_prompt(rows, nbytes % 100_000),
                    cost.upload(nbytes), cost.download(nbytes), cost.crossing(rows)):
        assert seconds >= 0 and math.isfinite(seconds)
        assert seconds > 0 or not tokens or not rows or not nbytes
    assert cost.device_attention([]) == cost.host_attention([]) == cost.linear(0) == cost.head(0) == 0
    assert cost.device_prompt(0, 100) == cost.upload(0) == cost.download(0) == cost.crossing(0) == 0


@settings(deadline=None)
@given(st.lists(st.integers(64, 32768), min_size=1, max_size=16), st.integers(1, 4000))
def test_attention_adds_up_over_rows_of_different_lengths(tokens, more):
    """This machine's attention is a + rows * (b + c * tokens), which the grid must give back exactly."""
    cost = CostModel(curves())
    expected = 2e-5 + sum(1e-6 + t * 2e-8 for t in tokens)
    assert cost.host_attention(tokens) == pytest.approx(expected)
    longer = [tokens[0] + more, *tokens[1:]]
    assert cost.host_attention(longer) - cost.host_attention(tokens) == pytest.approx(more * 2e-8, rel=1e-3)
    assert cost.host_attention(tokens[::-1]) == pytest.approx(cost.host_attention(tokens))
    assert cost.host_attention(tokens) == pytest.approx(cost.host_attention_of(len(tokens), sum(tokens) / len(tokens)))


@settings(deadline=None)
@given(st.floats(0, 600), st.floats(0, 100), st.integers(0, 50_000), st.integers(0, 10_000))
def test_more_rows_or_tokens_never_cost_less(rows, more, tokens, later):
    cost = CostModel(curves())
    assert cost.linear(rows + more) >= cost.linear(rows) - 1e-15
    assert cost.host_attention_of(rows + more, tokens) >= cost.host_attention_of(rows, tokens) - 1e-12
    assert cost.host_attention_of(rows, tokens + later) >= cost.host_attention_of(rows, tokens) - 1e-12
    assert cost.device_prompt(rows, tokens + later) >= cost.device_prompt(rows, tokens) - 1e-12


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1, 2), st.floats(1, 2))
def test_work_at_the_same_time(device, host, slow_device, slow_host):
    cost = CostModel(curves(contention_device=slow_device, contention_host=slow_host))
    end_device, end_host = cost.together(device, host)
    assert device - 1e-12 <= end_device <= device * slow_device + 1e-12
    assert host - 1e-12 <= end_host <= host * slow_host + 1e-12
    assert cost.overlapped(device, host) >= max(device, host) - 1e-12
    # The work done while both were busy, and what the longer one did alone, add up.
    both = min(end_device, end_host)
    if end_host >= end_device:
        assert both / slow_host + (end_host - both) == pytest.approx(host, abs=1e-12)
    else:
        assert both / slow_device + (end_device - both) == pytest.approx(device, abs=1e-12)


def test_work_alone_is_not_slowed():
    cost = CostModel(curves(contention_device=1.5, contention_host=1.2))
    assert cost.together(1.0, 0.0) == (1.0, 0.0)
    assert cost.together(0.0, 1.0) == (0.0, 1.0)


def test_the_correction_learns_what_is_common_and_what_is_of_each_kind():
    cost = CostModel(curves())
    assert math.isnan(cost.error)
    for _ in range(100):
        cost.note("overlap", cost.corrected("overlap", 1.0), 1.3)
    assert cost.corrected("overlap", 1.0) == pytest.approx(1.3, rel=1e-3)
    # Nobody has tried the other kind: that the machine is slower now is the likelier cause.
    assert 1.15 < cost.correction("synchronous") < cost.correction("overlap")
    for _ in range(200):
        cost.note("overlap", cost.corrected("overlap", 1.0), 1.3)
        cost.note("synchronous", cost.corrected("synchronous", 1.0), 0.9)
    assert cost.corrected("overlap", 1.0) == pytest.approx(1.3, rel=0.02)
    assert cost.corrected("synchronous", 1.0) == pytest.approx(0.9, rel=0.02)


def test_a_machine_that_slows_down_changes_no_order_of_kinds():
    cost = CostModel(curves())
    for slower in (1.0, 1.2):
        for kind in ("overlap", "synchronous", "overlap"):
            for _ in range(40):
                cost.note(kind, cost.corrected(kind, 1.0), slower)
    assert cost.correction("pipelined") == pytest.approx(1.2, rel=0.05)
    for _ in range(40):  # only one of them runs when it recovers
        cost.note("overlap", cost.corrected("overlap", 1.0), 1.0)
    assert cost.correction("synchronous") / cost.correction("overlap") < 1.1


def test_what_no_machine_does_by_itself_is_one_kinds_fault():
    cost = CostModel(curves())
    for _ in range(200):
        cost.note("pipelined", cost.corrected("pipelined", 1.0), 2.0)
    assert cost.correction("pipelined") == pytest.approx(2.0, rel=1e-2)
    assert cost.correction("synchronous") <= COMMON_BOUND * 1.0001


def test_the_correction_is_bounded():
    for measured, bound in ((1e6, BOUND), (1e-9, 1 / BOUND)):
        cost = CostModel(curves())
        for _ in range(1000):
            cost.note("overlap", cost.corrected("overlap", 1.0), measured)
        assert cost.correction("overlap") == pytest.approx(bound)


def test_one_outlier_moves_the_correction_little():
    cost = CostModel(curves())
    cost.note("overlap", 1.0, 1000.0)
    assert 1.0 < cost.correction("overlap") < 1.2  # the very first
    for _ in range(20):
        cost.note("overlap", cost.corrected("overlap", 1.0), 1.0)
    before = cost.correction("overlap")
    cost.note("overlap", before, 1000.0)
    assert before < cost.correction("overlap") < 1.1 * before


def test_error_is_the_median_of_what_predictions_were_off():
    cost = CostModel(curves())
    for predicted in (0.9, 1.0, 1.2, 1.05, 5.0):
        cost.note("overlap", predicted, 1.0)
    assert cost.error == pytest.approx(0.1)
    cost.note("device-only", 1.0, 1.0)
    assert cost.error_of("device-only") == 0
    before = cost.correction("synchronous")
    for useless in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        cost.note("synchronous", *useless)
    assert math.isnan(cost.error_of("synchronous")) and cost.correction("synchronous") == before


def test_curves_survive_json():
    for one in (curves(contention_host=1.25), curves(bring=((64, 1e-5), (512, 1e-4)))):
        assert Curves.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_without_figures_of_bringing_kv_the_copies_alone_count():
    cost = CostModel(curves())
    assert cost.bring(0) == 0 and cost.bring(160) == pytest.approx(cost.upload(160 * 65536 / 16))
    cost = CostModel(curves(bring=((64, 1e-3), (128, 2e-3))))
    assert cost.bring(0) == 0 and cost.bring(96) == pytest.approx(1.5e-3) and cost.bring(256) == pytest.approx(4e-3)


@pytest.mark.parametrize(("field", "value"), [
    ("layers", 0), ("layers", 1.5), ("linear", ()), ("linear", ((1, -1.0),)), ("linear", ((1, math.nan),)),
    ("linear", ((0, 1.0),)), ("linear", ((1, 1.0), (1, 2.0))), ("linear", ((1, 2, 1.0),)), ("upload", "none"),
    ("device_attention", ((1, 1.0),)), ("host_attention", ((1, 64, "x"),)), ("handover", -1e-6), ("q_bytes", 0),
    ("linear", ((1, 10**400),)), ("layers", 10**400), ("device_attention", ((1, 10**400, 1.0),)),
    ("kv_bytes_host", True), ("contention_device", 0.9), ("contention_host", math.inf)])
def test_figures_that_cannot_be_are_named(field, value):
    with pytest.raises(ProfileError, match=field):
        curves(**{field: value})
    broken = {**curves().as_json(), field: value}
    with pytest.raises(ProfileError, match=field):
        Curves.from_json(broken)


def test_fields_that_are_missing_are_named():
    broken = curves().as_json()
    del broken["handover"], broken["upload"]
    with pytest.raises(ProfileError, match="handover, upload missing"):
        Curves.from_json(broken)
    with pytest.raises(ProfileError, match="not a JSON object"):
        Curves.from_json([1])
