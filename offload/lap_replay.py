"""A lap in simulated time, call by call as `laps.py` makes them, on two processors that slow each other down. What is
predicted by a formula in `lap_times.py` is played out here: who waits for whom, which cohort misses the device."""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_runtime.offload.cost_model import CostModel
from edge_runtime.offload.lap_times import LapTimes, Load

AHEAD = 2  # layers whose KV is on its way when streaming
ENOUGH = 1e-12  # seconds: less is rounding


@dataclass(eq=False)
class Task:
    """Work of the host: `left` seconds of it, as measured alone."""

    left: float

    @property
    def done(self) -> bool:
        return self.left <= ENOUGH


@dataclass(eq=False)
class Cohort:
    """Rows of overlap laps that wait at `layer`; `task`: their attention of the layer before, None: they can go on."""

    keys: tuple[int, ...]
    load: Load
    layer: int = 0
    task: Task | None = None


@dataclass
class Processors:
    """The device works through what it is given; the host does its tasks in the order in which they came. While both
    work each is slower. Seconds since the beginning, and those that each was busy."""

    cost: CostModel
    now: float = 0.0
    device_busy: float = 0.0
    host_busy: float = 0.0
    tasks: deque[Task] = field(default_factory=deque)

    def device(self, seconds: float) -> None:
        """The device works for so long, as measured alone."""
        curves = self.cost.curves
        while seconds > ENOUGH:
            if self.tasks:
                took = min(seconds * curves.contention_device, self.tasks[0].left * curves.contention_host)
                seconds -= took / curves.contention_device
                self._host_works(took, took / curves.contention_host)
            else:
                took, seconds = seconds, 0.0
                self.now += took
            self.device_busy += took

    def host(self, seconds: float) -> Task:
        """A task for the host, behind those that it has."""
        task = Task(seconds)
        if not task.done:
            self.tasks.append(task)
        return task

    def wait(self, task: Task | None) -> None:
        """The device waits for a task."""
        while task is not None and not task.done:
            first = self.tasks[0].left
            self._host_works(first, first)

    def _host_works(self, took: float, done: float) -> None:
        self.now += took
        self.host_busy += took
        self.tasks[0].left -= done
        if self.tasks[0].done:
            self.tasks.popleft()


class LapReplay:
    """Laps on `by`, of whose prompts `times` knows."""

    def __init__(self, by: Processors, times: LapTimes):
        self.by, self.times, self.cost, self.layers = by, times, by.cost, times.layers

    def lockstep(self, device: Load, host: Load, rows: int) -> None:
        """Device-only and synchronous; every layer takes as long as the first one."""
        linear, attention = self._linear(rows), self.times.on_device(device)
        works = self._round(host)
        for _ in range(self.layers):
            self.by.device(linear)
            task = self.by.host(works)
            self.by.device(attention)
            self.by.wait(task)
        self._head(rows)

    def pipelined(self, device: Load, first: Load, second: Load) -> None:
        a, b = self._linear(device.rows + first.rows), self.cost.linear(second.rows)
        attention, works_a, works_b = self.times.on_device(device), self._round(first), self._round(second)
        two: Task | None = None
        for _ in range(self.layers):
            self.by.device(a)
            one = self.by.host(works_a)
            self.by.device(attention)
            self.by.wait(two)
            self.by.device(b)
            two = self.by.host(works_b)
            self.by.wait(one)
        self.by.wait(two)
        self._head(device.rows + first.rows + second.rows)

    def streaming(self, device: Load, streamed: Load) -> None:
        """The host's queue is the link: KV of a layer comes while the device is in the layers before."""
        rows = device.rows + streamed.rows
        linear = self._linear(rows)
        attention = self.times.on_device(Load(rows, device.tokens + streamed.tokens))
        copies = deque(self.by.host(self.cost.bring(streamed.tokens)) for _ in range(min(AHEAD, self.layers)))
        for layer in range(self.layers):
            self.by.device(linear)
            self.by.wait(copies.popleft())
            if layer + AHEAD < self.layers:
                copies.append(self.by.host(self.cost.bring(streamed.tokens)))
            self.by.device(attention)
        self._head(rows)

    def overlap(self, device: Load, cohorts: Sequence[Cohort], drain: bool = False) -> None:
        """Something moves in every lap. drain: the device waits for the cohorts, so that all come to the end."""
        batch, moved = device.rows + self.times.prompt_rows, False
        attention = self.times.on_device(device)
        while not moved:
            for layer in range(self.layers + 1):
                for cohort in cohorts:
                    if cohort.task is not None and cohort.layer == layer - 1 and (drain or cohort.task.done):
                        self.by.wait(cohort.task)
                        cohort.task, cohort.layer = None, layer
                members = [cohort for cohort in cohorts if cohort.layer == layer and cohort.task is None]
                moved = moved or bool(members) or batch > 0
                if layer == self.layers or not (members or batch):
                    continue
                self.by.device(self._linear(device.rows + sum(cohort.load.rows for cohort in members)))
                for cohort in members:
                    cohort.task = self.by.host(self._round(cohort.load))
                self.by.device(attention)
            if not moved:
                self.by.wait(min((cohort.task for cohort in cohorts if cohort.task), key=self.by.tasks.index))
        landed = sum(cohort.load.rows for cohort in cohorts if cohort.layer == self.layers)
        self._head(device.rows + landed)

    def _linear(self, rows: int) -> float:
        return self.cost.linear(rows + self.times.prompt_rows)

    def _round(self, load: Load) -> float:
        return self.times.on_host(load) + self.cost.crossing(load.rows) if load.rows else 0.0

    def _head(self, rows: int) -> None:
        self.by.device(self.cost.head(rows + self.times.prompt_ends))
