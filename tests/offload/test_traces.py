"""Requests from files and out of thin air."""
from __future__ import annotations

import itertools
import time

import pytest

from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.traces import TraceError, at_rate, read_trace, sample_trace, synthetic


def test_azures_columns(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
                    "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:48,12,0\n")
    first, second = read_trace(file)
    assert (first.arrival, first.prompt, first.output) == (0.0, 374, 44)
    assert second.arrival == pytest.approx(4.314579) and (second.prompt, second.output) == (396, 109)


def test_dates_of_any_time_zone(tmp_path, monkeypatch):
    file, head = tmp_path / "trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    file.write_text(head + "2024-05-10 00:00:00.0099300+00:00,1,1\n2024-05-10T00:00:01.51Z,1,1\n"
                    "2024-05-10 02:00:02+02:00,1,1\n2024-05-10 00:00:03.25,1,1\n")
    assert [one.arrival for one in read_trace(file)] == pytest.approx([0, 1.50007, 1.99007, 3.24007], abs=1e-6)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    if hasattr(time, "tzset"):
        time.tzset()
    try:  # clocks went back at three: this is two hours, not three
        file.write_text(head + "2023-10-29 01:30:00,1,1\n2023-10-29 03:30:00,1,1\n")
        assert [one.arrival for one in read_trace(file)] == [0, 7200]
    finally:
        monkeypatch.undo()
        if hasattr(time, "tzset"):
            time.tzset()


def test_lengths_alone_or_with_times(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("\ufeffprompt_tokens,output_tokens\r\n269,42\r\n\r\n270,52\r\n", encoding="utf-8")
    assert [(one.arrival, one.prompt, one.output) for one in read_trace(file)] == [(0, 269, 42), (0, 270, 52)]
    file.write_text("output_tokens,arrival,prompt_tokens\n5,7.5,10\n6,2.5,20\n")
    assert [(one.arrival, one.prompt, one.output) for one in read_trace(file)] == [(0, 20, 6), (5, 10, 5)]
    assert len(read_trace(file, limit=1)) == 1


@pytest.mark.parametrize("text, line, reason", [
    ("", 1, "columns missing"),
    ("a,b\n1,2\n", 1, "prompt_tokens"),
    ("prompt_tokens,output_tokens\n1,2\n3\n", 3, "1 fields"),
    ("prompt_tokens,output_tokens\n1,-2\n", 2, "'-2'"),
    ("prompt_tokens,output_tokens\n1,2.5\n", 2, "number of tokens"),
    ("prompt_tokens,output_tokens\n1,99999999999\n", 2, "99999999999"),
    ("prompt_tokens,output_tokens\n0,0\n", 0, "no request"),
    ("arrival,prompt_tokens,output_tokens\nyesterday,1,2\n", 2, "date and time"),
    ("arrival,prompt_tokens,output_tokens\nnan,1,2\n", 2, "must be a time"),
    ("arrival,prompt_tokens,output_tokens\n1e99,1,2\n", 2, "must be a time"),
    ("arrival,prompt_tokens,output_tokens\n2023-11-16 18:15:46.1e5,1,2\n", 2, "must be seconds, or a date"),
    ("arrival,prompt_tokens,output_tokens\n0,1,2\n2023-11-16 18:15:46,1,2\n", 0, "after the first"),
    (f"prompt_tokens,output_tokens\n1,{'9' * 5000}\n", 2, "number of tokens"),
])
def test_bad_files_are_refused_by_line(tmp_path, text, line, reason):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(file)
    assert caught.value.line == line and str(file) in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(TraceError):
        read_trace(tmp_path / "binary.csv")
    with pytest.raises(TraceError):
        read_trace(tmp_path)


def test_the_sample_that_ships():
    requests = sample_trace()
    assert 900 < len(requests) <= 1000 and requests[0].arrival == 0.0
    assert all(one.arrival <= two.arrival for one, two in itertools.pairwise(requests))
    assert 500 < sum(one.prompt for one in requests) / len(requests) < 2000
    assert len(sample_trace(10)) == 10


def test_synthetic_lengths_and_arrivals():
    requests = synthetic(4000, 1000, 200, rate=5.0, seed=3)
    assert requests == synthetic(4000, 1000, 200, rate=5.0, seed=3) != synthetic(4000, 1000, 200, rate=5.0, seed=4)
    assert {one.prompt for one in requests} <= set(range(900, 1101)) and min(one.output for one in requests) >= 180
    assert requests[-1].arrival == pytest.approx(4000 / 5.0, rel=0.1)
    assert {one.arrival for one in synthetic(5, 10, 10)} == {0.0}
    again = at_rate(requests, 50.0)
    assert again[-1].arrival == pytest.approx(80, rel=0.1) and again[7].prompt == requests[7].prompt
    assert at_rate(requests, None)[-1].arrival == 0.0


@pytest.mark.parametrize("arguments", [
    dict(count=0), dict(prompt=0), dict(output=-1), dict(rate=0.0), dict(rate=-1.0), dict(rate=float("inf")),
    dict(spread=1.0), dict(spread=-0.1), dict(prompt=10**9)])
def test_bad_figures(arguments):
    with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
        synthetic(**{"count": 5, "prompt": 10, "output": 10, **arguments})
