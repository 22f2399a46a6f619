"""Learn-then-Test (Angelopoulos et al., arXiv 2110.01052): choose settings whose risk is bounded, with confidence.

A loss lies in [0, 1] and is one sequence's; sequences are drawn independently, tokens inside one need not be.
Candidates are tested from the safest on, each against "its expected loss is above alpha", and testing stops at the
first that the data do not refute: then all that were passed hold together with the wanted confidence, without a
correction for their number.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

BOUNDS = ("betting", "hoeffding_bentkus")


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k), exact but for rounding, summed from the largest term down."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    i = np.arange(k + 1)
    ratios = np.log((n - i[1:] + 1) / i[1:]) + math.log(p) - math.log1p(-p)
    logs = n * math.log1p(-p) + np.concatenate(([0.0], np.cumsum(ratios)))
    top = float(logs.max())
    return min(1.0, math.exp(top) * math.fsum(np.exp(logs - top)))


def hoeffding_bentkus(losses: np.ndarray, alpha: float) -> float:
    """P-value of "the expected loss is above alpha" for independent losses in [0, 1]: the smaller of Hoeffding's (in
    its relative entropy form) and Bentkus's bound (arXiv 2110.01052, proposition 1). Knows their mean alone."""
    n, mean = len(losses), float(np.mean(losses)) if len(losses) else 1.0
    if mean >= alpha:
        return 1.0
    hoeffding = math.exp(-n * _relative_entropy(mean, alpha))
    # The sum of losses is rounded up, but not for the error of its own float sum.
    bentkus = math.e * binomial_cdf(math.ceil(n * mean - 1e-9), n, alpha)
    return min(1.0, hoeffding, bentkus)


def betting(losses: np.ndarray, alpha: float, delta: float = 0.05) -> float:
    """P-value of the same by betting against it (Waudby-Smith and Ramdas, arXiv 2010.09686): one over the largest
    capital of a gambler whose stakes depend on earlier losses alone. Valid by Ville's inequality for losses in any
    order; far sharper than `hoeffding_bentkus` where losses vary little, as shares of many tokens do. delta: the level
    that stakes are sized for.
    """
    n = len(losses)
    if not n:
        return 1.0
    x = np.asarray(losses, np.float64)
    counts = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(x)) / (counts + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (counts + 1)
    before = np.concatenate(([0.25], variances[:-1]))
    stakes = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (n * before)))
    capital = np.cumsum(np.log1p(-stakes * (x - alpha)))
    return min(1.0, math.exp(-max(0.0, float(capital.max()))))


def p_value(losses: np.ndarray, alpha: float, delta: float, bound: str = "betting") -> float:
    """By one of `BOUNDS`, chosen before the losses are seen."""
    return betting(losses, alpha, delta) if bound == "betting" else hoeffding_bentkus(losses, alpha)


def least_sequences(alpha: float, delta: float, bound: str = "betting") -> int:
    """The fewest sequences that can certify anything: as many as it takes when none has any loss."""
    high = 1
    while p_value(np.zeros(high), alpha, delta, bound) > delta:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(np.zeros(middle), alpha, delta, bound) <= delta else (middle, high)
    return high


@dataclass(frozen=True)
class Tested:
    """A candidate's number, the mean loss that was seen, its p-value and whether that certifies it."""

    number: int
    mean: float
    p: float
    certified: bool


def certify_in_sequence(numbers: Iterable[int], losses_of: Callable[[int], np.ndarray], alpha: float, delta: float,
                     bound: str = "betting") -> list[Tested]:
    """Test candidates in the order given until one is not certified, which is the last of the list. Candidates and
    their order must not depend on these losses."""
    found: list[Tested] = []
    for number in numbers:
        losses = losses_of(number)
        p = p_value(losses, alpha, delta, bound)
        found.append(Tested(number, float(np.mean(losses)), p, p <= delta))
        if not found[-1].certified:
            break
    return found




def _relative_entropy(a: float, b: float) -> float:
    """Of Bernoulli(a) from Bernoulli(b)."""
    left = a * math.log(a / b) if a > 0 else 0.0
    return left + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
