"""Stop strings: the text before them, whole, at once, and nothing of them."""
from __future__ import annotations

import random
import time

import pytest

from edge_runtime.stops import StopMatcher


def run(stops, pieces):
    matcher = StopMatcher(stops)
    out = [matcher.push(piece) for piece in pieces]
    return out, matcher.flush(), matcher.stop


@pytest.mark.parametrize(("stops", "pieces", "shown", "left", "stop"), [
    ((), ["a", "b"], ["a", "b"], "", None),
    (("END",), ["abc", "EN", "D!"], ["abc", "", ""], "", "END"),
    (("END",), ["abc", "EN", "d!"], ["abc", "", "ENd!"], "", None),
    (("END",), ["abc", "EN"], ["abc", ""], "EN", None),
    (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], "", "aab"),
    (("abcd", "bc"), ["xab", "c", "d"], ["x", "a", ""], "", "bc"),
    (("b", "ab"), ["ab"], [""], "", "ab"),
    (("\n\n",), ["one\n", "two\n", "\nthree"], ["one", "\ntwo", ""], "", "\n\n"),
    (("é!",), ["caf", "é", "!"], ["caf", "", ""], "", "é!"),
])
def test_cases(stops, pieces, shown, left, stop):
    assert run(stops, pieces) == (shown, left, stop)


def test_random_streams_against_search():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(500):
        stops = tuple({"".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))})
        text = "".join(rng.choices("abc", k=rng.randint(0, 40)))
        pieces, rest = [], text
        while rest:
            cut = rng.randint(1, 4)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        shown, left, stop = run(stops, pieces)
        ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
        expected = text[:min(ends)[0] + min(ends)[1]] if ends else text
        assert "".join(shown) + left == expected, (stops, text)
        assert (stop is None) == (not ends)
        for count in range(len(pieces)):  # never holds back more than the beginning of a stop string
            held = sum(map(len, pieces[:count])) - sum(map(len, shown[:count]))
            assert stop is not None or held < max(map(len, stops))


def test_long_and_many_stop_strings_are_fast():
    long = "x" * 10_000 + "y"
    many = tuple(f"stop number {i}" for i in range(1000))
    start = time.perf_counter()
    matcher = StopMatcher((long,))
    out = "".join(matcher.push("x" * 5) for _ in range(4000))
    assert len(out) == 10_000 and matcher.stop is None
    assert matcher.push("y") == "" and matcher.stop == long
    matcher = StopMatcher(many)
    assert matcher.push("no stop number ") == "no "
    assert matcher.push("999 ") == "" and matcher.stop == "stop number 9"
    assert time.perf_counter() - start < 2
