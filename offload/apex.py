"""The scheduler: which mode the next lap runs in, who attends where, and what should move meanwhile.

After APEX (arXiv 2506.03296), driven by measured curves instead of fixed rules. Pure and deterministic: the same object
serves the executor and the simulator.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.candidates import Candidate, Candidates, last, realize
from edge_runtime.offload.choices import SPLIT_GRAIN, Choice, Estimate, Mode, Row
from edge_runtime.offload.cost_model import CostModel
from edge_runtime.offload.lap_times import LapTimes, Load, PromptPart

__all__ = ["Apex", "Choice", "Mode", "Row"]

WAITS_IN_STEP = (Mode.DEVICE_ONLY, Mode.SYNCHRONOUS)  # modes in which every row that runs gets its token within the lap
KEPT = 512  # predicted and measured laps that `pairs` looks back on
FADE = 0.98  # of what is remembered of overlap's yield, a lap: some 50 laps


def whole_pages(tokens: int) -> int:
    """What a sequence takes of a pool that is handed out by pages."""
    return -(-tokens // SPLIT_GRAIN) * SPLIT_GRAIN


class Apex:
    """Chooses laps by predicted tokens per second.

    size: tokens of the pool that a sequence of n tokens takes. tbt_seconds: longest lap while somebody interactive is
    there (None: no limit). hysteresis: share by which another mode must be better than the one that runs. stay: laps
    that a mode keeps at least, unless device-only is better or the mode has nothing left to do. expected_tokens: laps
    over which bringing KV to the device must pay for itself, at least; who has run for longer is expected to go on for
    as long again. patience: laps after which a sequence longer than the
    whole pool makes the laps hybrid. split: the device can attend over a part of a sequence. modes: those to choose
    from. force: this mode for all rows whatever the prediction, interactive or not; where it has nothing to do,
    device-only, else synchronous.

    Raises InvalidRequestError for values outside their limits.
    """

    def __init__(self, cost: CostModel, *, size: Callable[[int], int] = whole_pages, tbt_seconds: float | None = None,
                 hysteresis: float = 0.05, stay: int = 8, expected_tokens: int = 128, patience: int = 512,
                 split: bool = True, modes: Sequence[Mode] = tuple(Mode), force: Mode | None = None):
        for name, value, least in (("hysteresis", hysteresis, 0), ("stay", stay, 0), ("patience", patience, 0),
                                   ("expected_tokens", expected_tokens, 1)):
            if not value >= least:
                raise InvalidRequestError(name, value, f"{least} or more")
        if tbt_seconds is not None and not tbt_seconds > 0:
            raise InvalidRequestError("tbt_seconds", tbt_seconds, "more than 0, or None")
        self.cost, self.size, self.tbt_seconds, self.force = cost, size, tbt_seconds, force
        self.hysteresis, self.stay, self.expected_tokens, self.patience = hysteresis, stay, expected_tokens, patience
        self.split, self.modes = split, tuple(modes)
        self.mode = Mode.DEVICE_ONLY
        self.pairs: deque[tuple[Mode, float, float]] = deque(maxlen=KEPT)  # mode, predicted and measured seconds
        self._laps = stay  # in this mode; a change at the very beginning needs no wait
        self._age: dict[int, int] = {}  # laps since a sequence was first seen
        self._waited: dict[int, int] = {}  # laps that sequences longer than the pool have waited
        self._landed = [0.0, 0.0]  # tokens of overlap's host rows: predicted and measured, fading
        self._considered: dict[Mode, Estimate] = {}

    def choose(self, rows: Sequence[Row], pool_tokens: int, prompt: Sequence[PromptPart] = ()) -> Choice:
        """The next lap for `rows`, oldest first, with a device pool of `pool_tokens` KV tokens in all (without what
        others than these rows hold of it). prompt: what rides along. InvalidRequestError: a key twice, a negative
        pool."""
        if pool_tokens < 0:
            raise InvalidRequestError("pool_tokens", pool_tokens, "0 or more")
        if len({row.key for row in rows}) != len(rows):
            raise InvalidRequestError("rows", [row.key for row in rows], "rows of different keys")
        times = LapTimes(self.cost, prompt, self._yield())
        self._age = {row.key: self._age.get(row.key, 0) + 1 for row in rows}
        if not rows:
            self._considered = {}
            return Choice(Mode.DEVICE_ONLY, predicted=times.device_only(Load(0, 0)).seconds)
        modes = self._allowed(rows, pool_tokens)
        if any(row.interactive for row in rows) and self.force is None:
            return self._in_time(rows, pool_tokens, times, modes)
        found = self._candidates(rows, pool_tokens, times)
        return self._answer(self._now(found, self._settle(found, modes), times), found, rows, pool_tokens)

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None:
        """A lap that was chosen took `seconds` and yielded `tokens`: corrects what such laps are predicted to take."""
        if choice.landing or (choice.mode is Mode.OVERLAP and not choice.device):
            return  # its time says nothing of the mode: it depends on who landed
        self.cost.note(choice.kind, choice.predicted, seconds)
        self.pairs.append((choice.mode, choice.predicted, seconds))
        if choice.mode is Mode.OVERLAP and self._laps > self.cost.layers:  # before, nobody can have landed
            predicted = (choice.tokens - len(choice.device)) / self._yield()
            landed = max(tokens - len(choice.device), 0)
            self._landed = [FADE * old + new for old, new in zip(self._landed, (predicted, landed))]

    def explain(self) -> dict[Mode, Estimate]:
        """What each mode was predicted to give at the last choice, best first."""
        return dict(sorted(self._considered.items(), key=lambda item: -item[1].rate))

    def _candidates(self, rows: Sequence[Row], pool: int, times: LapTimes, modes: Sequence[Mode] | None = None,
                    ) -> dict[Mode, Candidate]:
        expected = max(self.expected_tokens, sum(self._age[row.key] for row in rows) / max(len(rows), 1))
        place = Candidates(rows, pool, times, self.size, expected=expected, split=self.split)
        return {one.mode: one for one in place.all(modes or self.modes)}

    def _yield(self) -> float:
        """Host tokens that overlap laps gave, of those predicted: cohorts may miss the device."""
        predicted, measured = self._landed
        return min(max(measured / predicted, 0.5), 2.0) if predicted > 1 else 1.0

    def _allowed(self, rows: Sequence[Row], pool: int) -> Sequence[Mode]:
        """Device-only drops out when a sequence that it cannot serve has waited long enough."""
        if self.force is not None:
            return self.modes
        too_long = {row.key for row in rows if self.size(row.tokens) > pool}
        self._waited = {key: self._waited.get(key, 0) for key in too_long}
        if any(laps >= self.patience for laps in self._waited.values()):
            return [mode for mode in self.modes if mode is not Mode.DEVICE_ONLY]
        return self.modes

    def _estimate(self, one: Candidate) -> Estimate:
        seconds = self.cost.corrected(one.kind, one.lap.seconds) + one.upload
        return Estimate(seconds, one.lap.tokens, one.lap.bound_by)

    def _settle(self, found: dict[Mode, Candidate], modes: Sequence[Mode]) -> Candidate | None:
        """The mode to be in: the best, unless it is too little better than the one that runs."""
        self._considered = {mode: self._estimate(one) for mode, one in found.items()}
        found = {mode: one for mode, one in found.items() if mode in modes} or found
        if self.force is not None:
            ways = (self.force, Mode.DEVICE_ONLY, Mode.SYNCHRONOUS)
            found = dict([(mode, found[mode]) for mode in ways if mode in found][:1])
        if not found:
            return None
        rates = {mode: self._considered[mode].rate for mode in found}
        best = max(rates, key=lambda mode: (rates[mode], -list(Mode).index(mode)))
        if best is not self.mode:
            stays = self.mode in rates and best is not Mode.DEVICE_ONLY and (
                self._laps < self.stay or rates[best] <= (1 + self.hysteresis) * rates[self.mode])
            if stays:  # even then, hybrid gives way to the device alone where that is better
                best = Mode.DEVICE_ONLY if rates.get(Mode.DEVICE_ONLY, 0.0) > rates[self.mode] else self.mode
        if best is not self.mode:
            self.mode, self._laps = best, 0
        self._laps += 1
        return found[best]

    def _now(self, found: dict[Mode, Candidate], settled: Candidate | None, times: LapTimes) -> Candidate | None:
        """What runs while KV is on its way to where `settled` wants it."""
        if settled is None:
            return None
        now = realize(settled, times)
        if now is settled or Mode.SYNCHRONOUS not in found:
            return now
        idle = not now.rows()
        if idle or (settled.mode is Mode.DEVICE_ONLY and self.force is None):
            meanwhile = realize(found[Mode.SYNCHRONOUS], times)
            if idle or self._estimate(meanwhile).rate > self._estimate(now).rate:
                return replace(meanwhile, upload=0.0)
        return now

    def _in_time(self, rows: Sequence[Row], pool: int, times: LapTimes, modes: Sequence[Mode]) -> Choice:
        """Every interactive row, and as many others as the budget for a lap leaves room for."""
        urgent = [row for row in rows if row.interactive]
        others = sorted((row for row in rows if not row.interactive), key=lambda row: not row.ready)
        age = {row.key: i for i, row in enumerate(rows)}
        modes = [mode for mode in WAITS_IN_STEP if mode in modes] or list(WAITS_IN_STEP)

        def within(count: int) -> tuple[dict[Mode, Candidate], dict[Mode, Candidate]]:
            """Of a lap with `count` others: what each mode wants, and what of it can run now."""
            some = sorted([*urgent, *others[:count]], key=lambda row: age[row.key])
            wanted = self._candidates(some, pool, times, modes)
            now = {mode: realize(one, times) for mode, one in wanted.items()}
            return wanted, {mode: one for mode, one in now.items() if not any(row.interactive for row in one.waiting)}

        def fits(now: dict[Mode, Candidate]) -> bool:
            return self.tbt_seconds is None or any(
                self.cost.corrected(one.kind, one.lap.seconds) <= self.tbt_seconds for one in now.values())

        wanted, now = within(len(others))
        if others and not fits(now):
            wanted, now = within(last(lambda count: fits(within(count)[1]), len(others) - 1))
        in_time = {mode: one for mode, one in now.items() if fits({mode: one})}
        if not in_time and now:  # too slow even alone: at least as fast as it goes
            fastest = min(now, key=lambda mode: self.cost.corrected(now[mode].kind, now[mode].lap.seconds))
            in_time = {fastest: now[fastest]}
        settled = self._settle({mode: wanted[mode] for mode in in_time}, modes)
        running = now[settled.mode] if settled else None
        return self._answer(running, wanted, rows, pool)

    def _answer(self, now: Candidate | None, found: dict[Mode, Candidate], rows: Sequence[Row], pool: int) -> Choice:
        if now is None:  # nothing can run: a pool of nothing, and a mode that needs one
            return Choice(self.force or self.mode, waiting=tuple(row.key for row in rows))
        ran = {row.key for row in (*now.device, *now.host)}
        for key in self._waited:
            self._waited[key] += key not in ran
        target = found.get(self.mode, now)
        wanted = {row.key: row.tokens for row in target.device} | target.split
        bring = [row for row in rows if wanted.get(row.key, 0) > row.device_tokens + (row.key not in target.split)]
        split = now.split
        return Choice(
            now.mode, device=_keys(now.device), host=tuple(row.key for row in now.host if row.key not in split),
            split=dict(split), first=tuple(row.key for row in now.first if row.key not in split),
            waiting=tuple(row.key for row in rows if row.key not in ran),
            bring=_keys(sorted(bring, key=lambda row: (not row.interactive, row.tokens - row.device_tokens))),
            evict=self._evict(rows, wanted, pool), wanted=wanted,
            predicted=self.cost.corrected(now.kind, now.lap.seconds), tokens=now.lap.tokens, bound_by=now.lap.bound_by,
            landing=now.mode is not Mode.OVERLAP and any(row.flying >= 0 for row in rows),
            considered={mode.value: one.rate for mode, one in self._considered.items()})

    def _evict(self, rows: Sequence[Row], wanted: dict[int, int], pool: int) -> tuple[int, ...]:
        """Copies that the plan has no use for stay as long as nobody needs their room; the youngest go first."""
        held = {row.key: row.device_tokens for row in rows if row.device_tokens}
        used = sum(self.size(max(held.get(key, 0), tokens)) for key, tokens in wanted.items())
        used += sum(self.size(tokens) for key, tokens in held.items() if key not in wanted)
        gone = []
        for row in sorted(reversed(rows), key=lambda row: row.interactive):
            if used <= pool:
                break
            if row.key in held and row.key not in wanted:
                used -= self.size(held[row.key])
                gone.append(row.key)
        return tuple(gone)


def _keys(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(row.key for row in rows)
