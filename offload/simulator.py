"""The scheduler, driven by simulated time: requests arrive, prompts come in chunks, laps take what curves say."""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.apex import Apex
from edge_runtime.offload.choices import SPLIT_GRAIN, Choice, Mode, Row
from edge_runtime.offload.cost_model import CostModel, Curves
from edge_runtime.offload.lap_replay import Cohort, LapReplay, Processors
from edge_runtime.offload.lap_times import LapTimes, Load, PromptPart
from edge_runtime.offload.simulation_result import LapRecord, Measured, SimulationResult
from edge_runtime.offload.traces import Request

# What a policy lets the scheduler choose from. apex-paper: the modes that APEX has. NEO decides anew in every lap,
# between the device alone and two sub-batches; streaming is FlexGen's way; a mode's name forces that mode.
POLICIES: dict[str, dict[str, Any]] = {
    "apex": {},
    "apex-paper": {"modes": (Mode.DEVICE_ONLY, Mode.PIPELINED, Mode.OVERLAP)},
    "gpu-only": {"modes": (Mode.DEVICE_ONLY,)},
    "neo": {"modes": (Mode.DEVICE_ONLY, Mode.PIPELINED), "hysteresis": 0.0, "stay": 0},
    **{mode.value: {"force": mode} for mode in Mode if mode is not Mode.DEVICE_ONLY},
}


@dataclass(frozen=True)
class Limits:
    """pool_tokens: KV that the device holds. host_tokens: KV that the host's pages hold. batch: sequences at a time.
    chunk: prompt tokens of a lap. bring: tokens of one sequence that come to the device after a lap. tbt_seconds: of a
    lap while somebody interactive is there. page: tokens by which the device's pool is handed out."""

    pool_tokens: int
    host_tokens: int
    batch: int = 256
    chunk: int = 512
    bring: int = 256
    tbt_seconds: float | None = None
    page: int = SPLIT_GRAIN

    def __post_init__(self) -> None:
        for name, least in (("pool_tokens", 0), ("host_tokens", 1), ("batch", 1), ("chunk", 1), ("bring", 1),
                            ("page", 1)):
            if getattr(self, name) < least:
                raise InvalidRequestError(name, getattr(self, name), f"{least} or more")

    def size(self, tokens: int) -> int:
        """What a sequence takes of the device's pool."""
        return -(-tokens // self.page) * self.page


@dataclass(eq=False)
class _Sequence:
    key: int
    request: Request
    read: int = 0  # prompt tokens that are in the KV
    generated: int = 0
    device_tokens: int = 0
    on_device: bool = False  # its prompt's KV is kept there
    times: list[float] = field(default_factory=list)  # of its tokens

    @property
    def reading(self) -> bool:
        return self.read < self.request.prompt

    @property
    def tokens(self) -> int:
        """KV that its next token attends over, its own included."""
        return self.read + self.generated


class Simulation:
    """One policy over one list of requests. InvalidRequestError: an unknown policy."""

    def __init__(self, curves: Curves, requests: Sequence[Request], limits: Limits, policy: str = "apex"):
        if policy not in POLICIES:
            raise InvalidRequestError("policy", policy, f"one of {', '.join(POLICIES)}")
        self.policy, self.limits = policy, limits
        self.by = Processors(CostModel(curves))
        self.apex = Apex(CostModel(curves), size=limits.size, tbt_seconds=limits.tbt_seconds, **POLICIES[policy])
        self.records: list[LapRecord] = []
        self._alone = policy == "gpu-only"
        self._arriving = deque(_Sequence(i, request) for i, request in enumerate(requests))
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._done: list[_Sequence] = []
        self._refused = 0
        self._cohorts: list[Cohort] = []
        self._held_back = False  # somebody waits for room on the device

    def run(self) -> SimulationResult:
        while self._arriving or self._waiting or self._running:
            self._admit()
            if self._running:
                self.lap()
            elif self._arriving:
                self.by.now = max(self.by.now, self._arriving[0].request.arrival)
        return SimulationResult.of(
            self.policy, self.limits.pool_tokens, self.by.cost.curves.kv_bytes_device, self.records,
            [Measured(s.request.arrival, s.request.prompt, tuple(s.times)) for s in self._done], self._refused,
            self.by.device_busy, self.by.host_busy)

    def start(self, lengths: Sequence[int]) -> None:
        """Sequences that decode without end, whose KV of so many tokens is on the host."""
        for key, tokens in enumerate(lengths):
            self._running[key] = _Sequence(key, Request(0.0, tokens, 1 << 40), read=tokens)

    def lap(self) -> Choice:
        """One pass of the device, prompts' chunks along with it."""
        prompts = self._chunks()
        rows = [self._row(s) for s in self._running.values() if not s.reading]
        parts = [PromptPart(count, s.read) for s, count in prompts]
        reserved = sum(self.limits.size(s.request.prompt) for s in self._running.values() if s.reading and s.on_device)
        choice = self.apex.choose(rows, max(self.limits.pool_tokens - reserved, 0), parts)
        for key in choice.evict:
            self._running[key].device_tokens = 0
        began, device, host = self.by.now, self.by.device_busy, self.by.host_busy
        ran = self._replay(choice, LapReplay(self.by, LapTimes(self.by.cost, parts)))
        if rows and not prompts:
            self.apex.measured(choice, self.by.now - began, len(ran))
        for key in ran:
            self._token(self._running[key], key in choice.device)
        for s, count in prompts:
            s.read += count
            if not s.reading:
                s.device_tokens = s.read if s.on_device else 0
                self._token(s, False)
        self._held_back = choice.mode is Mode.DEVICE_ONLY and bool(choice.waiting)
        if not self._bring(choice) and self.by.now == began and not ran and not prompts:
            raise InvalidRequestError("pool_tokens", self.limits.pool_tokens,
                                      f"enough for a sequence that policy {self.policy} runs")
        self.records.append(LapRecord(
            began, self.by.now - began, choice.mode, len(choice.device), len(ran) - len({*choice.device} & {*ran}),
            len(choice.waiting), sum(count for _, count in prompts), self._on_device(), self.by.device_busy - device,
            self.by.host_busy - host, len(ran)))
        return choice

    def _replay(self, choice: Choice, lap: LapReplay) -> list[int]:
        """Plays the lap; the keys that got a token."""
        loads = {key: s.tokens for key, s in self._running.items()}

        def load(keys: Sequence[int]) -> Load:
            return Load(len(keys), sum(loads[key] for key in keys))

        if choice.mode is Mode.OVERLAP or self._cohorts:
            flying = {key for cohort in self._cohorts for key in cohort.keys}
            fresh = tuple(key for key in choice.host if key not in flying)
            if fresh and choice.mode is Mode.OVERLAP:
                self._cohorts.append(Cohort(fresh, load(fresh)))
            going = [key for key in choice.device if key not in flying]
            lap.overlap(load(going), self._cohorts, drain=choice.mode is not Mode.OVERLAP)
            landed = [cohort for cohort in self._cohorts if cohort.layer == lap.layers and cohort.task is None]
            self._cohorts = [cohort for cohort in self._cohorts if cohort not in landed]
            return [*going, *(key for cohort in landed for key in cohort.keys)]
        host = load(choice.host)
        if choice.mode is Mode.STREAMING:
            lap.streaming(load(choice.device), host)
        elif choice.mode is Mode.PIPELINED:
            second = [key for key in choice.host if key not in choice.first]
            lap.pipelined(load(choice.device), load(choice.first), load(second))
        else:
            split, parts = load(tuple(choice.split)), sum(choice.split.values())
            device = load(choice.device)
            lap.lockstep(Load(device.rows + split.rows, device.tokens + parts),
                         Load(host.rows + split.rows, host.tokens + split.tokens - parts),
                         device.rows + host.rows + split.rows)
        return [*choice.device, *choice.host, *choice.split]

    def _row(self, s: _Sequence) -> Row:
        flying = next((cohort.layer for cohort in self._cohorts if s.key in cohort.keys), -1)
        return Row(s.key, s.tokens, min(s.device_tokens, s.tokens - 1), s.request.interactive, flying)

    def _token(self, s: _Sequence, on_device: bool) -> None:
        s.device_tokens += on_device
        s.generated += 1
        s.times.append(self.by.now)
        if s.generated >= s.request.output:
            self._done.append(self._running.pop(s.key))

    def _chunks(self) -> list[tuple[_Sequence, int]]:
        """The oldest prompts first, until the lap's chunk is full."""
        left, found = self.limits.chunk, []
        for s in self._running.values():
            if s.reading and left:
                count = min(s.request.prompt - s.read, left)
                found.append((s, count))
                left -= count
        return found

    def _admit(self) -> None:
        """In the order of arrival. The device alone takes a prompt when it has room for it, and nobody who was moved
        out waits; otherwise the host's pages must hold the whole sequence."""
        while self._arriving and self._arriving[0].request.arrival <= self.by.now:
            s = self._arriving.popleft()
            most = min(self.limits.host_tokens, self.limits.pool_tokens if self._alone else self.limits.host_tokens)
            if self.limits.size(s.request.prompt + s.request.output) > most:
                self._refused += 1
            else:
                self._waiting.append(s)
        while self._waiting and len(self._running) < self.limits.batch:
            s = self._waiting[0]
            room = self._on_device() + self.limits.size(s.request.prompt + 1) <= self.limits.pool_tokens
            whole = sum(r.request.prompt + r.request.output for r in self._running.values())
            if self._alone and (self._held_back or not room):
                return
            if whole + s.request.prompt + s.request.output > self.limits.host_tokens:
                return
            s.on_device = room
            self._running[s.key] = self._waiting.popleft()

    def _on_device(self) -> int:
        """Tokens of the device's pool that are taken."""
        return sum(self.limits.size(s.request.prompt + 1 if s.reading else s.device_tokens)
                   for s in self._running.values() if s.device_tokens or (s.reading and s.on_device))

    def _bring(self, choice: Choice) -> int:
        """How many tokens came to the device."""
        came = 0
        for key in choice.bring:
            s = self._running.get(key)
            if s is None:
                continue
            count = min(choice.wanted[key], s.tokens - 1, s.device_tokens + self.limits.bring) - s.device_tokens
            more = self.limits.size(s.device_tokens + count) - self.limits.size(s.device_tokens)
            if count > 0 and self._on_device() + more <= self.limits.pool_tokens:
                s.device_tokens += count
                came += count
                self.by.device(self.by.cost.layers * self.by.cost.bring(count))
        return came


def simulate(curves: Curves, requests: Sequence[Request], limits: Limits, policy: str = "apex") -> SimulationResult:
    """See `Simulation`."""
    return Simulation(curves, requests, limits, policy).run()


@dataclass(frozen=True)
class Prediction:
    """tokens_per_second, seconds: of `laps` laps that gave `tokens` tokens; mode: that most of them ran in."""

    tokens_per_second: float
    seconds: float
    tokens: int
    laps: int
    mode: Mode


def predict_decode(curves: Curves, lengths: Sequence[int], pool_tokens: int, *, mode: Mode | None = None,
                   laps: int = 64, settle: int = 512, apex: Apex | None = None) -> Prediction:
    """Decoding of sequences with `lengths` KV tokens, in a `mode` or in those that the scheduler chooses (`apex`, else
    one with its defaults): `laps` laps, after at most `settle` in which KV comes to where it is wanted and cohorts
    start."""
    if not lengths:
        raise InvalidRequestError("lengths", lengths, "the KV tokens of one sequence or more")
    if laps < 1:
        raise InvalidRequestError("laps", laps, "1 or more")
    policy = "apex" if mode is None else "gpu-only" if mode is Mode.DEVICE_ONLY else mode.value
    host = 2 * sum(lengths) + (laps + settle) * len(lengths)
    simulation = Simulation(curves, [], Limits(pool_tokens, host, batch=len(lengths), bring=max(lengths)), policy)
    simulation.apex = apex or simulation.apex
    simulation.start(lengths)
    for lap in range(settle):
        choice = simulation.lap()
        # Overlap's cohorts have started, and landed; otherwise the mode has had time to change.
        least = 4 * curves.layers if choice.mode is Mode.OVERLAP else 2 * simulation.apex.stay
        if not choice.bring and lap >= least:
            break
    began, before = simulation.by.now, len(simulation.records)
    for _ in range(laps):
        simulation.lap()
    records = simulation.records[before:]
    tokens, seconds = sum(record.tokens for record in records), simulation.by.now - began
    modes = [record.mode for record in records]
    return Prediction(tokens / seconds, seconds, tokens, laps, max(set(modes), key=lambda mode: modes.count(mode)))
