"""Everything at once on a hybrid device: arrivals, priorities, cancellations, forks, shared prefixes, preemption, and
modes and places that change with every lap. Every reply is the reference's."""
from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import SamplingParams
from edge_runtime.offload.apex import Apex
from edge_runtime.offload.choices import Choice, Mode, Row
from edge_runtime.offload.cost_model import CostModel
from tests.gguf_factory import write_model
from tests.offload.faulty import Hybrid, hybrid
from tests.offload.test_apex import curves

LAYERS = 4
STEPS = 800  # of each test
SECONDS = 120.0  # that they may take at most
WAITING = 24  # requests at once
FEW_PAGES = 11  # of the host: sequences push each other out


class Reckless:
    """Any mode, and any place that is possible, for any row, in every lap."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.cost = SimpleNamespace(error=0.0)
        self.modes: set[Mode] = set()

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice:
        rng, mode = self.rng, self.rng.choice(list(Mode))
        if rng.random() < 0.5:
            mode = Mode.OVERLAP  # as long as cohorts need to be at different layers
        device: list[int] = []
        host: list[int] = []
        waiting: list[int] = []
        split: dict[int, int] = {}
        for row in rows:
            if row.flying >= 0:
                (host if rng.random() < 0.9 else waiting).append(row.key)
            elif row.ready and rng.random() < 0.6:
                device.append(row.key)
            elif row.device_tokens >= 64 and rng.random() < 0.3:
                split[row.key] = rng.randrange(64, row.device_tokens + 1, 64)
            else:
                (host if rng.random() < 0.8 else waiting).append(row.key)
        keys = [row.key for row in rows]
        some = lambda share: tuple(key for key in keys if rng.random() < share)
        self.modes.add(mode)
        return Choice(mode, device=tuple(device), host=tuple(host), split=split, waiting=tuple(waiting),
                      first=tuple(key for key in host if rng.random() < 0.5), bring=some(0.4), evict=some(0.05),
                      wanted={row.key: rng.randint(1, row.tokens) for row in rows if rng.random() < 0.3})

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None:
        assert seconds > 0 and tokens >= 0


class Crowd:
    """Requests that come and go; each ends with the reference's tokens or, cancelled, with the first of them. urgent:
    share of those that are interactive."""

    def __init__(self, h: Hybrid, rng: random.Random, gap: float, urgent: float):
        self.h, self.rng, self.gap, self.urgent = h, rng, gap, urgent
        self.open: list[tuple[Any, list[int], list[int]]] = []  # stream, prompt, its tokens so far
        self.sessions = [(h.llm.session(), list[int]())]
        self.beginnings = [self.tokens(n) for n in (64, 130, 190)]
        self.done = self.cancelled = 0

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(260) for _ in range(count)]

    def prompt(self) -> list[int]:
        if self.rng.random() < 0.5:
            shared = self.rng.choice(self.beginnings)
            return shared[:self.rng.randrange(1, len(shared) + 1)] + self.tokens(self.rng.randrange(0, 20))
        return self.tokens(self.rng.choice([1, 3, 20, 63, 64, 65, 120, 200]))

    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.rng.choice([1, 2, 8, 20, 60, 150]), ignore_eos=True)

    def arrive(self) -> None:
        prompt = self.prompt()
        priority = "interactive" if self.rng.random() < self.urgent else "batch"
        stream = self.h.llm.stream(prompt, self.params(), priority=priority)
        self.open.append((stream, prompt, []))
        if self.rng.random() < 0.3:
            self.rng.choice(self.open[-3:])[0].cancel()

    def listen(self) -> None:
        """Some chunks of some request."""
        at = self.rng.randrange(len(self.open))
        stream, prompt, tokens = self.open[at]
        for _ in range(self.rng.randrange(1, 20)):
            chunk = next(stream, None)
            if chunk is None:
                self.open.pop(at)
                self.ended(prompt, tokens, stream.reply.finish_reason)
                return
            tokens += chunk.token_ids

    def ended(self, prompt: list[int], tokens: list[int], reason: str) -> None:
        assert reason in ("length", "cancelled"), reason
        self.cancelled += reason == "cancelled"
        self.h.check(prompt, tokens, self.gap)
        self.done += 1

    def converse(self) -> None:
        """A session goes on, or is forked first."""
        session, tokens = self.rng.choice(self.sessions)
        if self.rng.random() < 0.4:
            session, tokens = session.fork(), list(tokens)
            self.sessions = [*self.sessions[-3:], (session, tokens)]
        if len(tokens) > 250:
            session.truncate(100)
            del tokens[100:]
        tokens += self.tokens(self.rng.randrange(1, 70))
        reply = session.generate(tokens[len(session):], self.params())
        self.ended(list(tokens), list(reply.token_ids), reply.finish_reason)
        tokens += reply.token_ids

    def measure(self) -> None:
        """Requests whose rows all give something: hidden states and scores."""
        if self.rng.random() < 0.5:
            assert self.h.llm.embed("a few words" * self.rng.randrange(1, 9)).shape == (self.h.config.width,)
        else:
            prompt = self.prompt()
            assert len(self.h.llm.score([prompt])[0]) == len(prompt)

    def integrity(self) -> None:
        """Of all pages, and of the copies: between two steps."""
        engine, device = self.h.llm.engine, self.h.device

        def check() -> None:
            running = [seq.table for seq in engine.batcher.sequences()]
            parked = {id(table) for table in engine.cache._parked.values()}
            engine.cache.check_integrity([table for table in running if id(table) not in parked])
            alive = {seq.key: seq for seq in engine.batcher.running}
            assert set(device._copies) <= set(alive)
            assert all(device._copies[key].length <= alive[key].table.length for key in device._copies)
            assert set(device._cohorts._slices) <= set(alive)

        engine.call(check)

    def run(self) -> None:
        began = time.monotonic()
        while self.h.llm.engine.steps < STEPS:
            assert time.monotonic() - began < SECONDS, f"{self.h.llm.engine.steps} steps in {SECONDS} s"
            while len(self.open) < WAITING and self.rng.random() < 0.8:
                self.arrive()
            if not self.open:
                self.arrive()
            urgent = [self.converse, self.measure] if self.rng.random() < self.urgent else []
            self.rng.choice([*[self.listen] * 4, self.integrity, *urgent])()
        while self.open:
            self.listen()
        for session, _ in self.sessions:
            session.truncate(0)
        self.h.settled()
        assert self.done > 10 and self.cancelled


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("stress") / "m.gguf", layers=LAYERS, width=64)


def seeded() -> random.Random:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("kv, gap, pages", [("fp16", 0.01, 24), ("int8", 0.3, FEW_PAGES)])
def test_any_mode_and_any_place_in_every_lap(path, kv, gap, pages):
    rng = seeded()
    apex = Reckless(rng)
    with hybrid(path, apex, kv=kv, pages=pages, device_kv=600 * 1024, max_batch=12) as h:
        crowd = Crowd(h, random.Random(rng.random()), gap, urgent=0.5)
        crowd.run()
        assert apex.modes == set(Mode) and (pages > FEW_PAGES or h.llm.engine.batcher.preemptions)
        status = h.device.status()
        assert status.lost == status.short == 0
        print(crowd.done, "replies", crowd.cancelled, "cancelled", h.llm.engine.batcher.preemptions, "preemptions",
              status.modes)


@pytest.mark.parametrize("linear, host", [(1e-4, 2e-7), (1e-5, 4e-7), (1e-3, 1e-8)])
def test_the_scheduler_itself(path, linear, host):
    """Made-up curves: laps bound by the host's attention or by weights."""
    rng = seeded()
    cost = CostModel(curves(linear=linear, device=1e-8, host=host, layers=LAYERS))
    with hybrid(path, Apex(cost, tbt_seconds=0.05, stay=2, patience=20), pages=14, device_kv=600 * 1024,
                max_batch=12) as h:
        crowd = Crowd(h, rng, 0.01, urgent=0.05)
        crowd.run()
        print(crowd.done, "replies", h.device.status().modes)
