"""For each mode the best lap that it could run: who attends where, how sub-batches and cohorts are cut, and how long it
takes once KV is where the lap wants it. `realize` says what can run now, with KV where it is."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from edge_runtime.offload.choices import SPLIT_GRAIN, Mode, Row
from edge_runtime.offload.lap_times import Lap, LapTimes, Load

SPLIT_GAIN = 1.02  # a split row costs two attentions and a merge, which curves do not hold: it must promise more
SPLIT_LEAST = 256  # tokens on each side of a split: below, calls cost more than the work they share


@dataclass(frozen=True)
class Candidate:
    """A lap of `mode`. seconds: corrected by measurements, and with the uploads that it needs, spread over the tokens
    that a sequence is expected to live on. moving: rows that attend on the host until their KV has come."""

    mode: Mode
    lap: Lap
    device: Sequence[Row] = ()
    host: Sequence[Row] = ()
    split: dict[int, int] = field(default_factory=dict)
    first: Sequence[Row] = ()
    waiting: Sequence[Row] = ()
    upload: float = 0.0

    @property
    def kind(self) -> str:
        return "split" if self.split else self.mode.value

    def rows(self) -> int:
        return len(self.device) + len(self.host)


def load(rows: Iterable[Row]) -> Load:
    tokens = [row.tokens for row in rows]
    return Load(len(tokens), sum(tokens))


class Candidates:
    """Of `rows`, oldest first, with a device pool of `pool` tokens, of which a sequence of n tokens takes size(n).

    expected: laps over which an upload pays for itself. split: the device can attend over a part of a sequence.
    `device_only`, `synchronous` ... give the best lap of a mode, None where the mode has nothing to offer.
    """

    def __init__(self, rows: Sequence[Row], pool: int, times: LapTimes, size: Callable[[int], int], *,
                 expected: float, split: bool = True):
        self.rows, self.pool, self.times, self.size = rows, pool, times, size
        self._expected, self._can_split = expected, split
        self._age = {row.key: i for i, row in enumerate(rows)}
        # Those that are there stay, those that are on their way go on; of the others, short ones: they give the most
        # rows for the pool's bytes.
        self.fitting, self.over, self._left = self._fill(
            sorted(rows, key=lambda row: (
                not row.interactive, not row.ready, row.flying >= 0, row.tokens - row.device_tokens)))
        self._ready = sum(row.ready for row in self.fitting)  # those of them that nothing need be brought for
        self._before = [0, *accumulate(row.tokens for row in self.fitting)]
        self._missing = [0, *accumulate(0 if row.ready else row.tokens - row.device_tokens for row in self.fitting)]

    def all(self, modes: Iterable[Mode]) -> list[Candidate]:
        ways = {Mode.DEVICE_ONLY: self.device_only, Mode.SYNCHRONOUS: self.synchronous, Mode.PIPELINED: self.pipelined,
                Mode.OVERLAP: self.overlap, Mode.STREAMING: self.streaming}
        return [found for mode in modes if (found := ways[mode]()) is not None]

    def device_only(self) -> Candidate | None:
        """In the order of age behind those that are there: who has come waits for its turn, but not for ever."""
        order = sorted(self.rows, key=lambda row: (not row.interactive, not row.ready))
        device, waiting, _ = self._fill(order, in_turn=True)
        if any(row.interactive for row in waiting) or not device:
            return None
        missing = sum(row.tokens - row.device_tokens for row in device if not row.ready)
        return Candidate(Mode.DEVICE_ONLY, self.times.device_only(load(device)), device, waiting=waiting,
                         upload=self._upload(missing))

    def synchronous(self) -> Candidate | None:
        """All rows run; the device's share grows until the pool is full or both sides take equally long, or is nothing
        where its attention is worth less than it slows the host's. The row at the border is split, where that promises
        enough."""
        count, held = len(self.fitting), self._before
        rows, total = len(self.rows), sum(row.tokens for row in self.rows)

        def loads(whole: int, part: int) -> tuple[Load, Load]:
            tokens = held[whole] + part
            return Load(whole + (part > 0), tokens), Load(rows - whole, total - tokens)

        def hides(whole: int, part: int) -> bool:
            """The device's attention ends before the host's."""
            device, host = loads(whole, part)
            works = self.times.on_host(host) + self.times.cost.crossing(host.rows)
            ends = self.times.cost.together(self.times.on_device(device), works)
            return ends[0] <= ends[1]

        border = last(lambda whole: hides(whole, 0), count)
        shares = [(whole, 0) for whole in {0, border, border + 1, min(self._ready, border)}
                  if whole <= count and whole < rows]
        if self._can_split:
            row = self.fitting[border] if border < count else max(
                self.over, key=lambda row: (row.device_tokens, row.tokens), default=None)
            most = 0 if row is None else self._cut(row) if border < count else self._split_of(row, self._left)
            part = last(lambda pages: hides(border, pages * SPLIT_GRAIN), most // SPLIT_GRAIN) * SPLIT_GRAIN
            if row is not None and part >= SPLIT_LEAST:
                shares.append((border, part))
        if not shares:
            return None
        found = []
        for whole, part in shares:
            missing = self._missing[whole] + (max(part - row.device_tokens, 0) if part and row else 0)
            found.append(Candidate(
                Mode.SYNCHRONOUS, self.times.synchronous(*loads(whole, part), rows), self.fitting[:whole],
                self._aged([*self.fitting[whole:], *self.over]), {row.key: part} if part and row else {},
                upload=self._upload(missing)))
        return max(found, key=lambda one: self.rate(one) / (SPLIT_GAIN if one.split else 1))

    def pipelined(self) -> Candidate | None:
        """As many of the host's rows as hide behind the device (NEO's admission), or all of them; B takes what its
        window, the computation of A, can hide."""
        found = []
        for count, host in self._cuts():
            device = Load(count, self._before[count])
            before = [0, *accumulate(row.tokens for row in host)]

            def window(rows: int, device: Load = device) -> float:
                each = rows / 2
                return (self.times.cost.linear(device.rows + each + self.times.prompt_rows)
                        + self.times.on_device(device) + self.times.cost.linear(each))

            for admitted in {len(host), self._knee(before, window)} - {0}:
                parted = self._part(device, before, admitted)
                lap = self.times.pipelined(device, Load(parted, before[parted]),
                                           Load(admitted - parted, before[admitted] - before[parted]))
                found.append(Candidate(Mode.PIPELINED, lap, self.fitting[:count], host[:admitted], first=host[:parted],
                                       waiting=host[admitted:], upload=self._upload(self._missing[count])))
        return self._best(found)

    def overlap(self) -> Candidate | None:
        """As many host rows as keep the host busy, spread over cohorts that begin a lap apart from each other; the
        others stay on the ground, for the device's next free place. Cohorts that are under way go on."""
        found = []
        for count, rows in self._cuts():
            if not count and self.fitting:
                continue  # without rows on the device a lap has no length of its own: pipelining does it better
            device = Load(count, self._before[count])
            host = sorted(rows, key=lambda row: row.flying < 0)
            before = [0, *accumulate(row.tokens for row in host)]
            busy = self._busy(before, self.times.device_only(device).seconds)
            flying = sum(row.flying >= 0 for row in host)
            host = host[:max(busy, flying)] if count else host
            hosted, most = Load(len(host), before[len(host)]), min(self.times.layers, len(host))
            for cohorts in {1, (most + 3) // 4, (most + 1) // 2, most}:
                size = -(-len(host) // cohorts)
                found.append(Candidate(
                    Mode.OVERLAP, self.times.overlap(device, hosted, cohorts), self.fitting[:count],
                    host[:flying + size], upload=self._upload(self._missing[count])))
        best = self._best(found)
        if best is None:
            return None
        running = {row.key for row in (*best.device, *best.host)}
        return replace(best, waiting=[row for row in self.rows if row.key not in running])

    def streaming(self) -> Candidate | None:
        """As many rows as the link brings in time, or all of them. The pool holds two layers of what is under way."""
        found = []
        for count, host in self._cuts():
            device = Load(count, self._before[count])
            spare = self.pool - sum(self.size(row.tokens) for row in self.fitting[:count])
            before = [0, *accumulate(row.tokens for row in host)]
            fits = bisect_right(before, spare * self.times.layers / 2) - 1

            def behind(rows: int, device: Load = device, before: list[int] = before) -> bool:
                streamed = Load(rows, before[rows])
                return self.times.streaming(device, streamed).bound_by != "transfer"

            for admitted in {fits, last(behind, fits)} - {0}:
                found.append(Candidate(Mode.STREAMING, self.times.streaming(device, Load(admitted, before[admitted])),
                                       self.fitting[:count], host[:admitted], waiting=host[admitted:],
                                       upload=self._upload(self._missing[count])))
        return self._best(found)

    def rate(self, candidate: Candidate) -> float:
        """Tokens per second: the lap's time corrected, its uploads included."""
        seconds = self.times.cost.corrected(candidate.kind, candidate.lap.seconds) + candidate.upload
        return candidate.lap.tokens / seconds if seconds > 0 else 0.0

    def _fill(self, order: Sequence[Row], in_turn: bool = False) -> tuple[list[Row], list[Row], int]:
        """Who fits the pool, who does not, what is left. in_turn: nobody passes one that waits for room, unless that
        one would not fit an empty pool either."""
        left, fit, over = self.pool, [], []
        closed = False
        for row in order:
            needs = self.size(row.tokens)
            if needs <= left and not (closed and in_turn):
                fit.append(row)
                left -= needs
            else:
                over.append(row)
                closed = closed or needs <= self.pool
        return fit, over, left

    def _cuts(self) -> Iterable[tuple[int, list[Row]]]:
        """How many rows stay on the device, and the host's, oldest first."""
        most = len(self.fitting)
        for count in sorted({most, most // 2, self._ready, 0}, reverse=True):
            host = self._aged([*self.fitting[count:], *self.over])
            if host:
                yield count, host

    def _aged(self, rows: list[Row]) -> list[Row]:
        return sorted(rows, key=lambda row: self._age[row.key])

    def _upload(self, tokens: float) -> float:
        return self.times.layers * self.times.cost.bring(tokens) / self._expected

    def _cut(self, row: Row) -> int:
        """Most that the device may attend over of a split row."""
        return (row.tokens - SPLIT_LEAST) // SPLIT_GRAIN * SPLIT_GRAIN

    def _split_of(self, row: Row, left: int) -> int:
        """Leading tokens of a row that find room in what is left, if the copy that it has does."""
        if self.size(row.device_tokens) > left:
            return 0
        part = min(left // SPLIT_GRAIN * SPLIT_GRAIN, self._cut(row))
        while part > 0 and self.size(part) > left:
            part -= max((self.size(part) - left) // SPLIT_GRAIN // 2, 1) * SPLIT_GRAIN
        return max(part, 0)

    def _knee(self, before: Sequence[int], window: Callable[[int], float]) -> int:
        """How many of the host's rows hide behind the device's work."""
        cost = self.times.cost

        def hidden(rows: int) -> bool:
            host = self.times.on_host(Load(rows, before[rows])) + cost.crossing(rows)
            return host * cost.curves.contention_host <= window(rows)

        return last(hidden, len(before) - 1)

    def _busy(self, before: Sequence[int], seconds: float) -> int:
        """Host rows whose attention, once each, keeps the host at work for so long."""
        return self._knee(before, lambda rows: seconds) + 1

    def _part(self, device: Load, before: Sequence[int], admitted: int) -> int:
        """Host rows of sub-batch A, so that the rounds of A and B take equally long."""
        cost, half = self.times.cost, admitted / 2
        linear_a = cost.linear(device.rows + half + self.times.prompt_rows)
        works = self.times.on_host(Load(admitted, before[admitted])) + cost.crossing(admitted)
        share = (1 - (linear_a - cost.linear(half)) / works) / 2 if works > 0 else 0.0
        return min(max(bisect_right(before, share * before[admitted]) - 1, 0), admitted - 1)

    def _best(self, found: Sequence[Candidate]) -> Candidate | None:
        return max(found, key=self.rate, default=None)


def last(holds: Callable[[int], bool], most: int) -> int:
    """The largest of 0 .. most that `holds`, which holds up to some number and not beyond."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def realize(wanted: Candidate, times: LapTimes) -> Candidate:
    """The same lap with KV where it is: rows whose KV has not come yet attend on the host, or wait for it where that
    would take them away for many laps; who is under way in a cohort stays there."""
    moving = [row for row in wanted.device if not row.ready or (wanted.mode is Mode.OVERLAP and row.flying >= 0)]
    held = {row.key: row.device_tokens for row in wanted.host}
    split = {key: min(part, held[key] // SPLIT_GRAIN * SPLIT_GRAIN) for key, part in wanted.split.items()}
    split = {key: part for key, part in split.items() if part >= SPLIT_LEAST}
    if not moving and split == wanted.split:
        return wanted
    keys = {row.key for row in moving}
    device = [row for row in wanted.device if row.key not in keys]
    if wanted.mode is Mode.DEVICE_ONLY:
        return replace(wanted, device=device, waiting=[*moving, *wanted.waiting], lap=times.device_only(load(device)))
    if wanted.mode is Mode.OVERLAP:
        host = [*wanted.host, *(row for row in moving if row.flying >= 0)]
        waiting = [*wanted.waiting, *(row for row in moving if row.flying < 0)]
        cohorts = max(min(len({row.flying for row in host}), times.layers), 1)
        lap = times.overlap(load(device), load(host), cohorts) if host else times.device_only(load(device))
        return replace(wanted, device=device, host=host, waiting=waiting, lap=lap)
    host, first = [*wanted.host, *moving], wanted.first
    parts = sum(split.values())
    if wanted.mode is Mode.SYNCHRONOUS:
        # What a moving row has on the device already is worth attending over there.
        on_device, on_host = load(device), load(host)
        lap = times.synchronous(Load(on_device.rows + len(split), on_device.tokens + parts),
                                Load(on_host.rows, on_host.tokens - parts), len(device) + len(host))
    elif wanted.mode is Mode.PIPELINED:
        first = [*first, *moving]
        ahead = {row.key for row in first}
        lap = times.pipelined(load(device), load(first), load(row for row in host if row.key not in ahead))
    else:
        lap = times.streaming(load(device), load(host))
    return replace(wanted, device=device, host=host, first=first, split=split, lap=lap)
