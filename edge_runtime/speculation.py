"""Self-speculation: how many tokens to draft before a check, from what drafts have been worth so far.

Exactness needs no care here. Every position is drawn from the full model's logits by the request's own sampler, as it
would be without drafts; a draft only decides whether the next position's logits are already there. So a seed gives the
same reply with and without drafts, and the distribution is the full model's (drafting greedily is the case of
speculative sampling, arXiv 2211.17192, whose draft distribution is a single token).
"""
from __future__ import annotations

from dataclasses import dataclass, field

# A draft is taken about as often as the exit is sure of it; below this it costs more than it brings, where the shared
# layers and the head are a third of the model.
STOP_BELOW = 0.5
PRIOR_ACCEPTANCE = 0.8
MEMORY = 0.9  # weight of the past, per check
PROBE_STEPS = 64  # where drafting does not pay, it is tried again after so many plain tokens
SELDOM = 0.1  # share of the rounds that make a draft at all, below which asking the exit is not worth its head
OUTLIER = 3.0  # times what was expected: the machine did something else meanwhile
PRIOR_TURN = 0.3  # of a plain step, before anything is measured: a turn of drafting
PRIOR_CHECK = 0.05  # and a further row in the check


@dataclass
class Acceptance:
    """Of one sequence: the share of drafts that its own draws agree with, the recent ones most."""

    accepted: float = 4 * PRIOR_ACCEPTANCE
    drafted: float = 4.0
    started: float = 1.0
    plain_steps: int = 0

    def note(self, drafted: int, accepted: int, asked: int) -> None:
        """Of `asked` drafts `drafted` were made before the exit was unsure. Those after the first that was refused were
        never looked at."""
        if asked:
            self.started = MEMORY * self.started + (1 - MEMORY) * bool(drafted)
        judged = min(drafted, accepted + 1)
        self.accepted = self.accepted * MEMORY + accepted
        self.drafted = self.drafted * MEMORY + judged
        self.plain_steps = 0 if drafted else self.plain_steps + 1

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted


@dataclass
class Costs:
    """Seconds of one speculation as a straight line over the rows run per sequence, the recent ones most.

    steepest: the most that a row may add, as a share of the first one: a draft runs the lower layers and its check the
    upper ones, so together no more than a step. What a busy machine makes of a measurement is bounded by it.
    """

    steepest: float = 0.7
    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_rows: float = 0.0
    rows_seconds: float = 0.0

    def note(self, rows: int, seconds: float) -> None:
        if not self.weight:  # the prior's slope, at the scale of the first measurement
            unit = seconds / (1 + (rows - 1) * (PRIOR_TURN + PRIOR_CHECK))
            for prior in (1, 8):
                self._add(prior, unit * (1 + (prior - 1) * (PRIOR_TURN + PRIOR_CHECK)))
        seconds = min(seconds, OUTLIER * self.predict(rows))
        self._decay()
        self._add(rows, seconds)

    def predict(self, rows: int) -> float:
        """Relative where nothing was measured."""
        spread = self.rows_rows * self.weight - self.rows * self.rows
        if not self.weight or spread <= 1e-9 * self.rows_rows * self.weight:
            return 1 + (rows - 1) * (PRIOR_TURN + PRIOR_CHECK)
        slope = (self.rows_seconds * self.weight - self.rows * self.seconds) / spread
        mean, middle = self.seconds / self.weight, self.rows / self.weight
        first = mean - slope * (middle - 1)
        if not 0 <= slope <= self.steepest * first:  # the line through the middle that is as steep as may be
            share = self.steepest if slope > 0 else 0.0
            first = mean / (1 + share * (middle - 1))
            slope = share * first
        return first + slope * (rows - 1)

    def _decay(self) -> None:
        for name in ("weight", "rows", "seconds", "rows_rows", "rows_seconds"):
            setattr(self, name, getattr(self, name) * 0.97)

    def _add(self, rows: int, seconds: float) -> None:
        self.weight += 1
        self.rows += rows
        self.seconds += seconds
        self.rows_rows += rows * rows
        self.rows_seconds += rows * seconds


@dataclass
class DraftControl:
    """Chooses draft lengths for a device; one for all sequences, costs apart by how many draft together."""

    costs: dict[int, Costs] = field(default_factory=dict)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def choose(self, acceptance: Acceptance, together: int, most: int) -> int:
        """Drafts before the next check, 0 to `most`: the most tokens per second that this acceptance lets expect."""
        if most <= 0:
            return 0
        rate, costs = min(acceptance.rate, 0.999), self._costs(together)
        tokens = lambda drafts: (1 - rate ** (drafts + 1)) / (1 - rate)
        best = max(range(most + 1), key=lambda drafts: tokens(drafts) / costs.predict(drafts + 1))
        if acceptance.started < SELDOM:
            best = 0
        return min(2, most) if best == 0 and acceptance.plain_steps >= PROBE_STEPS else best

    def note(self, layer: int, most: int, together: int, rows: int, seconds: float) -> None:
        """`together` sequences, asked for up to `most` drafts at exit `layer`, ran up to `rows` rows each in `seconds`.
        The first time is not counted: the device may have had to prepare for it."""
        if (layer, most) in self._seen:
            self._costs(together).note(rows, seconds)
        self._seen.add((layer, most))

    def _costs(self, together: int) -> Costs:
        size = together.bit_length()  # many rows are a question of arithmetic: each adds its whole cost
        return self.costs.setdefault(size, Costs(min(1.0, 0.6 + 0.1 * size)))
