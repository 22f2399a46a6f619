"""P-values against scipy's and their promise by simulation; candidates tested in order."""
from __future__ import annotations

import math
import random

import numpy as np
import pytest

from edge_runtime.risk_control import (
    BOUNDS,
    betting,
    binomial_cdf,
    certify_in_sequence,
    hoeffding_bentkus,
    least_sequences,
    p_value,
)

# scipy.stats.binom.cdf(k, n, p) of scipy 1.17.1
BINOMIAL = [
    (0, 10, 0.05, 0.5987369392383789), (3, 50, 0.1, 0.250293905953308), (5, 1000, 0.01, 0.0661395116072514),
    (12, 20, 0.5, 0.8684120178222656), (60, 100, 0.7, 0.020988576003924744),
    (2, 5000, 0.002, 0.0027512691884996154), (900, 1000, 0.95, 8.410251084877745e-11),
    (480, 100000, 0.005, 0.1914530604154011), (7, 7, 0.3, 1.0)]


@pytest.fixture
def rng():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize("k, n, p, expected", BINOMIAL)
def test_binomial_cdf(k, n, p, expected):
    assert binomial_cdf(k, n, p) == pytest.approx(expected, rel=1e-8)


def test_binomial_cdf_against_scipy_and_exact_sums(rng):
    for _ in range(60):
        n = int(rng.integers(1, 400))
        k, p = int(rng.integers(-1, n + 1)), float(rng.uniform(0.001, 0.999))
        exact = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert binomial_cdf(k, n, p) == pytest.approx(exact, rel=1e-9, abs=1e-200)
    stats = pytest.importorskip("scipy.stats")
    for _ in range(60):
        n = int(rng.integers(1, 20_000))
        p = float(rng.uniform(0.001, 0.5))
        k = int(rng.binomial(n, p * rng.uniform(0.3, 1.2)))
        assert binomial_cdf(k, n, p) == pytest.approx(float(stats.binom.cdf(k, n, p)), rel=1e-7, abs=1e-250)


def test_hoeffding_bentkus_by_hand():
    losses = np.array([0.0] * 97 + [1.0] * 3)
    # exp(-100 kl(0.03, 0.1)) and e P(Binomial(100, 0.1) <= 3)
    kl = 0.03 * math.log(0.3) + 0.97 * math.log(0.97 / 0.9)
    bentkus = math.e * sum(math.comb(100, i) * 0.1**i * 0.9 ** (100 - i) for i in range(4))
    assert hoeffding_bentkus(losses, 0.1) == pytest.approx(min(math.exp(-100 * kl), bentkus), rel=1e-9)
    assert hoeffding_bentkus(np.zeros(100), 0.05) == pytest.approx(0.95**100, rel=1e-9)
    assert hoeffding_bentkus(np.full(50, 0.2), 0.2) == 1.0
    assert hoeffding_bentkus(np.empty(0), 0.2) == betting(np.empty(0), 0.2) == 1.0


def test_p_values_fall_with_more_data_and_rise_with_losses(rng):
    for bound in BOUNDS:
        some = (rng.random(400) < 0.02).astype(float)
        assert p_value(np.zeros(50), 0.05, 0.05, bound) > p_value(np.zeros(100), 0.05, 0.05, bound)
        assert p_value(some, 0.05, 0.05, bound) > p_value(some, 0.1, 0.05, bound)
        worse = np.maximum(some, rng.random(400) < 0.01)
        assert p_value(worse, 0.05, 0.05, bound) >= p_value(some, 0.05, 0.05, bound)
        assert 0 <= p_value(some, 0.05, 0.05, bound) <= 1


def test_betting_is_sharper_where_losses_vary_little():
    losses = np.tile([0.0, 0.02, 0.04], 100)
    assert betting(losses, 0.05) < 1e-3 < hoeffding_bentkus(losses, 0.05)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", ["coins", "shares", "rare and whole"])
def test_a_false_claim_is_certified_no_more_often_than_promised(bound, name, rng):
    """The expected loss is alpha exactly, the hardest case of the null hypothesis."""
    alpha, delta, n, runs = 0.05, 0.1, 300, 2000
    draw = {"coins": lambda: (rng.random(n) < alpha).astype(float),
            "shares": lambda: rng.binomial(40, rng.beta(0.5, 9.5, n)) / 40,
            "rare and whole": lambda: np.where(rng.random(n) < 0.04, 1.0, 1 / 96)}[name]
    wrong = sum(p_value(draw(), alpha, delta, bound) <= delta for _ in range(runs)) / runs
    assert wrong <= delta + 4 * math.sqrt(delta * (1 - delta) / runs)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_least_number_of_sequences(bound):
    for alpha, delta in ((0.05, 0.05), (0.01, 0.05), (0.1, 0.2)):
        n = least_sequences(alpha, delta, bound)
        assert p_value(np.zeros(n), alpha, delta, bound) <= delta < p_value(np.zeros(n - 1), alpha, delta, bound)
    assert least_sequences(0.05, 0.05, "hoeffding_bentkus") == 59  # 0.95**59 < 0.05


def test_testing_stops_at_the_first_that_fails():
    losses = {0: np.zeros(200), 1: np.full(200, 0.01), 2: np.full(200, 0.2), 3: np.zeros(200)}
    asked = []

    def losses_of(number):
        asked.append(number)
        return losses[number]

    found = certify_in_sequence(range(4), losses_of, 0.05, 0.05)
    assert [t.certified for t in found] == [True, True, False] and asked == [0, 1, 2]
    assert found[1].mean == pytest.approx(0.01)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_chosen_candidate_breaks_its_promise_no_more_often_than_allowed(bound, rng):
    """Thirty candidates, nested, whose risk crosses alpha on the way: family-wise, over whole runs of the test."""
    alpha, delta, n, runs = 0.1, 0.1, 150, 1000
    risks = np.linspace(0.0, 0.25, 30)
    broken = used = 0
    for _ in range(runs):
        u = rng.random((n, 20)) * np.sqrt(rng.uniform(0.2, 1.8, n))[:, None]  # sequences differ in how hard they are
        losses = (u[None] < (risks * _scale())[:, None, None]).mean(axis=2)
        found = certify_in_sequence(range(30), losses.__getitem__, alpha, delta, bound)
        passed = [t.number for t in found if t.certified]
        used += bool(passed and passed[-1] > 0)
        broken += bool(passed and risks[passed[-1]] > alpha)
    assert used > runs / 2
    assert broken / runs <= delta + 4 * math.sqrt(delta * (1 - delta) / runs)


def _scale() -> float:
    """So that P(u < risk * scale) = risk on the average: 1 / E[1 / sqrt(v)] with v uniform between 0.2 and 1.8."""
    return 1.6 / (2 * (math.sqrt(1.8) - math.sqrt(0.2)))
