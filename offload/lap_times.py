"""How long a lap takes in each mode: the formulas of APEX (arXiv 2506.03296) and NEO (arXiv 2411.01142) over measured
curves, so that a weight-bound linear segment is a case of them and not an assumption.

A lap is one pass of the device through all layers. Loads are rows and their KV tokens in all.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edge_runtime.offload.cost_model import CostModel


class Load(NamedTuple):
    """Decoding rows that attend in one place, and the KV tokens that they attend over together."""

    rows: int
    tokens: float


class PromptPart(NamedTuple):
    """`rows` tokens of one prompt that ride along in a lap, after `before` tokens; they attend on the device."""

    rows: int
    before: int


@dataclass(frozen=True)
class Lap:
    """seconds of all layers and the head; device, host: seconds that each works; tokens: what decoding rows yield;
    bound_by: the part that the time hangs on."""

    seconds: float
    tokens: float
    bound_by: str
    device: float
    host: float = 0.0


class LapTimes:
    """Lap times from a cost model, uncorrected. prompt: what rides along in the batch of the device's rows. landing:
    host tokens that overlap laps were seen to yield, of those predicted."""

    def __init__(self, cost: CostModel, prompt: Sequence[PromptPart] = (), landing: float = 1.0):
        self.cost, self.layers, self._landing = cost, cost.layers, landing
        self.prompt_rows = sum(part.rows for part in prompt)
        self._prompt_attention = sum(cost.device_prompt(part.rows, part.before) for part in prompt)
        self.prompt_ends = len(prompt)  # rows of the head, at most: the last token of each prompt

    def on_device(self, load: Load) -> float:
        """Attention of one layer on the device, prompts included."""
        alone = self.cost.device_attention_of(load.rows, load.tokens / load.rows) if load.rows else 0.0
        return alone + self._prompt_attention

    def on_host(self, load: Load) -> float:
        """Attention of one layer on the host, without the way there and back."""
        return self.cost.host_attention_of(load.rows, load.tokens / load.rows) if load.rows else 0.0

    def device_only(self, device: Load) -> Lap:
        """L (T_gl + T_ga) + head."""
        linear, attention = self.cost.linear(device.rows + self.prompt_rows), self.on_device(device)
        seconds = self.layers * (linear + attention) + self.cost.head(device.rows + self.prompt_ends)
        return Lap(seconds, device.rows, "weights" if linear >= attention else "device attention", seconds)

    def synchronous(self, device: Load, host: Load, rows: int) -> Lap:
        """All rows in one batch; the device attends over its tokens while the host attends over its own, and each
        layer waits for both. A split row counts in both loads, once in `rows`."""
        cost = self.cost
        linear, attention = cost.linear(rows + self.prompt_rows), self.on_device(device)
        works, crosses = self.on_host(host), cost.crossing(host.rows)
        device_ends, host_ends = cost.together(attention, works + crosses)
        head = cost.head(rows + self.prompt_ends)
        seconds = self.layers * (linear + max(device_ends, host_ends)) + head
        waits = {"device attention": device_ends} if device_ends >= host_ends else {
            "host attention": works, "transfer": crosses}
        return Lap(seconds, rows, _largest({"weights": linear, **waits}),
                   self.layers * (linear + device_ends) + head, self.layers * works)

    def pipelined(self, device: Load, first: Load, second: Load) -> Lap:
        """Two sub-batches: A (the device's rows and the host rows `first`), B (the host rows `second`). The device does
        segment A, attention of A, segment B and begins again; the host attends to one while the device computes the
        other. A layer takes as long as the slowest of: the device, the host, and each sub-batch's own round.

        Where everything hides it is NEO's 2 T_gl + T_ga.
        """
        cost, layers = self.cost, self.layers
        batch_a = device.rows + first.rows + self.prompt_rows
        linear_a, linear_b, attention = cost.linear(batch_a), cost.linear(second.rows), self.on_device(device)
        works_a, works_b = self.on_host(first), self.on_host(second)
        a, b = works_a + cost.crossing(first.rows), works_b + cost.crossing(second.rows)
        slower = cost.curves.contention_host
        busy = linear_a + attention + linear_b
        both = cost.overlapped(busy, a + b)
        layer = max(both, linear_b + slower * b, linear_a + slower * a)
        head = cost.head(device.rows + first.rows + second.rows + self.prompt_ends)  # one for both
        hidden = both > slower * (a + b) and layer == both
        parts = {"weights": linear_a + linear_b, "device attention": attention} if hidden else {
            "host attention": works_a + works_b, "transfer": a + b - works_a - works_b}
        return Lap(layers * layer + head, device.rows + first.rows + second.rows, _largest(parts),
                   layers * busy + head, layers * (works_a + works_b))

    def overlap(self, device: Load, host: Load, cohorts: int) -> Lap:
        """The device's rows never wait; `cohorts` cohorts share the host's rows and join the batch of their next layer
        when the device comes by: one layer a lap, as one cohort starts in every lap, or all of them where its attention
        is done before the device's. A host that cannot keep up advances as many as it can.

        Where linears are weight-bound it is APEX's T_gl + T_ga, and the host's own rate comes on top.
        """
        cost, layers = self.cost, self.layers
        batch, rows = device.rows + self.prompt_rows, host.rows / cohorts
        linear, attention = cost.linear(batch), self.on_device(device)
        more = max(cost.linear(batch + rows) - linear, 0.0)  # what a joining cohort adds
        works, crosses = cost.host_attention_of(rows, host.tokens / host.rows), cost.crossing(rows)
        each = (works + crosses) * cost.curves.contention_host
        host_bound = "host attention" if works >= crosses else "transfer"
        if not batch:  # nothing but cohorts: a lap is one layer of all of them
            seconds = max(cohorts * each, cohorts * more, more + each) + cost.head(host.rows / layers)
            bound = "weights" if more >= each else host_bound
            return Lap(seconds, host.rows / layers * self._landing, bound, cohorts * more, cohorts * works)
        joins: float = layers if each <= attention else cohorts
        slower = cost.curves.contention_device
        alone = layers * (linear + attention) + cost.head(device.rows + self.prompt_ends)
        seconds, bound = alone + joins * more, "weights" if linear >= attention else "device attention"
        seconds += min(joins * each, seconds) * (1 - 1 / slower)
        if joins * each > seconds:  # saturated: the host works all the time
            seconds = slower * alone / (1 - min(slower * more / each, 0.9))
            joins, bound = seconds / each, host_bound
        landed = joins * rows / layers * self._landing
        seconds += cost.head(device.rows + self.prompt_ends + landed) - cost.head(device.rows + self.prompt_ends)
        return Lap(seconds, device.rows + landed, bound, seconds, min(joins * works, seconds))

    def streaming(self, device: Load, streamed: Load) -> Lap:
        """All rows attend on the device; the KV of `streamed` comes over the link a layer ahead of its use."""
        cost, rows = self.cost, device.rows + streamed.rows
        linear = cost.linear(rows + self.prompt_rows)
        attention = self.on_device(Load(rows, device.tokens + streamed.tokens))
        device_ends, copied = cost.together(linear + attention, cost.bring(streamed.tokens))
        head = cost.head(rows + self.prompt_ends)
        bound = _largest({"weights": linear, "device attention": attention}) if device_ends >= copied else "transfer"
        return Lap(self.layers * max(device_ends, copied) + head, rows, bound,
                   self.layers * (linear + attention) + head, 0.0)


def _largest(parts: dict[str, float]) -> str:
    return max(parts, key=lambda name: parts[name])
