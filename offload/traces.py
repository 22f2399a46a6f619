"""Requests for the simulator: when each arrives, how long its prompt and its reply are."""
from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError

COLUMNS = (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), ("arrival", "prompt_tokens", "output_tokens"),
           ("prompt_tokens", "output_tokens"))
MOST_TOKENS = 10_000_000  # of one request: beyond, a figure is in the wrong column
MOST_SECONDS = 1e9  # between the first arrival and the last: beyond, seconds are lost in rounding
DATE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII)
SAMPLE = "azure_conversations.csv"


class TraceError(EdgeRuntimeError, ValueError):
    """A trace cannot be read: `path`, the `line` (0: the file as a whole) and why."""

    def __init__(self, path: object, line: int, reason: str):
        where = f"{path}, line {line}" if line else f"{path}"
        super().__init__(f"{where}: {reason}.")
        self.path, self.line, self.reason = str(path), line, reason


@dataclass(frozen=True)
class Request:
    """arrival: seconds from the start. prompt, output: tokens, 1 or more. interactive: somebody waits for it."""

    arrival: float
    prompt: int
    output: int
    interactive: bool = False


def read_trace(path: str | Path, limit: int | None = None) -> list[Request]:
    """A CSV file with the columns of Azure's traces (TIMESTAMP, ContextTokens, GeneratedTokens), or prompt_tokens,
    output_tokens and, if it is there, arrival in seconds; without times all arrive at once. In the order of arrival,
    the first at 0, at most `limit` of them. Requests without a prompt or a reply are left out. TraceError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _read(file, path, limit)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(path, 0, f"cannot be read: {error}") from None


def sample_trace(limit: int | None = None) -> list[Request]:
    """The first conversations of Azure's trace of November 2023 (offload/data/README.md)."""
    name = files("edge_runtime.offload") / "data" / SAMPLE
    with name.open(encoding="utf-8") as file:
        return _read(file, name, limit)


def synthetic(count: int, prompt: int, output: int, *, rate: float | None = None, spread: float = 0.1,
              seed: int = 0) -> list[Request]:
    """`count` requests with lengths uniform in ±`spread` around `prompt` and `output`, as in NEO's synthetic workloads.
    rate: requests per second of a Poisson process; None: all at once. InvalidRequestError."""
    for name, value in (("count", count), ("prompt", prompt), ("output", output)):
        if not 1 <= value <= MOST_TOKENS:
            raise InvalidRequestError(name, value, f"1 to {MOST_TOKENS}")
    if not 0 <= spread < 1:
        raise InvalidRequestError("spread", spread, "0 or more, below 1")
    if rate is not None and not 0 < rate < float("inf"):
        raise InvalidRequestError("rate", rate, "requests per second, above 0")
    draw, now, found = random.Random(seed), 0.0, []
    for i in range(count):
        now += draw.expovariate(rate) if rate and i else 0.0
        lengths = [max(1, round(mean * draw.uniform(1 - spread, 1 + spread))) for mean in (prompt, output)]
        found.append(Request(now, lengths[0], lengths[1]))
    return found


def at_rate(requests: Sequence[Request], rate: float | None, seed: int = 0) -> list[Request]:
    """The same requests at the times of a Poisson process of `rate` per second; None: all at once."""
    if rate is not None and not 0 < rate < float("inf"):
        raise InvalidRequestError("rate", rate, "requests per second, above 0")
    draw, now, found = random.Random(seed), 0.0, []
    for i, request in enumerate(requests):
        now += draw.expovariate(rate) if rate and i else 0.0
        found.append(replace(request, arrival=now))
    return found


def _read(file, path: object, limit: int | None) -> list[Request]:
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    columns = next((names for names in COLUMNS if set(names) <= set(header)), None)
    if columns is None:
        known = "; or ".join(", ".join(names) for names in COLUMNS)
        raise TraceError(path, 1, f"columns {', '.join(header)[:80] or 'missing'}: must be {known}")
    places = [header.index(name) for name in columns]
    found: list[Request] = []
    for line, fields in enumerate(reader, start=2):
        if not fields:
            continue
        if len(fields) <= max(places):
            raise TraceError(path, line, f"{len(fields)} fields, the header has {len(header)}")
        values = [fields[place].strip() for place in places]
        arrival = _seconds(path, line, values[0]) if len(values) == 3 else 0.0
        prompt, output = (_tokens(path, line, value) for value in values[-2:])
        if prompt and output:
            found.append(Request(arrival, prompt, output))
    if not found:
        raise TraceError(path, 0, "holds no request")
    found.sort(key=lambda request: request.arrival)
    start = found[0].arrival
    if found[-1].arrival - start > MOST_SECONDS:
        raise TraceError(path, 0, f"the last request arrives {found[-1].arrival - start:.3g} seconds after the first: "
                                  f"must be {MOST_SECONDS:.0e} at most")
    return [replace(request, arrival=request.arrival - start) for request in found[:limit]]


def _tokens(path: object, line: int, text: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) > MOST_TOKENS:  # longer ones Python may refuse to read
        raise TraceError(path, line, f"{text[:40]!r}: must be a number of tokens, 0 to {MOST_TOKENS}")
    return int(text)


def _seconds(path: object, line: int, text: str) -> float:
    """Seconds, or a date with a time, whose fraction may have more than six digits; without a time zone it counts as
    universal time, where no hour comes twice."""
    try:
        seconds = float(text)
    except ValueError:
        parts = DATE.fullmatch(text)
        try:
            if parts is None:
                raise ValueError
            day, fraction, zone = parts.groups()
            zone = "+00:00" if zone in (None, "Z") else zone
            seconds = datetime.fromisoformat(day + zone).timestamp() + float(f"0{fraction or ''}")
        except ValueError:
            raise TraceError(path, line, f"{text[:40]!r}: must be seconds, or a date and time such as 2023-11-16 "
                                         "18:15:46.680590") from None
    if not abs(seconds) < 1e12:
        raise TraceError(path, line, f"{text[:40]!r}: must be a time")
    return seconds
