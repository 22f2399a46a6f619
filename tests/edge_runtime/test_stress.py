"""Many threads doing everything at once with few pages; every text is checked against the device's own."""
from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest

from edge_runtime import SamplingParams
from edge_runtime.errors import InvalidRequestError, NumericalError
from tests.edge_runtime.llms import fake_llm, settled
from tests.fake_device import BOS, greedy

SECONDS = 2.0


class Worker(threading.Thread):
    def __init__(self, llm, seed: int, folder):
        super().__init__()
        self.llm, self.rng, self.folder, self.seed = llm, random.Random(seed), folder, seed
        self.error: BaseException | None = None
        self.sessions = [(llm.session(), [])]
        self.done = 0

    def run(self) -> None:
        end = time.monotonic() + SECONDS
        try:
            while time.monotonic() < end:
                self.rng.choice([self.generate, self.many, self.stream, self.session, self.fork, self.save,
                                 self.poison, self.embed])()
                self.done += 1
        except BaseException as error:
            self.error = error

    def text(self) -> str:
        return self.rng.choice(["", "a shared beginning " * 8, "another one " * 20]) + str(self.rng.randrange(30))

    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.rng.randint(1, 40))

    def generate(self) -> None:
        text, params = self.text(), self.params()
        assert self.llm.generate(text, params).token_ids == self.expected([BOS, *text.encode()], params)

    def many(self) -> None:
        texts, params = [self.text() for _ in range(self.rng.randint(1, 8))], self.params()
        for text, reply in zip(texts, self.llm.generate(texts, params)):
            assert reply.token_ids == self.expected([BOS, *text.encode()], params)

    def stream(self) -> None:
        text, params = self.text(), self.params()
        ids: list[int] = []
        with self.llm.stream(text, params) as stream:
            for chunk in stream:
                ids += chunk.token_ids
                if self.rng.random() < 0.05:
                    stream.cancel()
                if self.rng.random() < 0.02:
                    break
        assert tuple(ids) == self.expected([BOS, *text.encode()], params)[:len(ids)]

    def session(self) -> None:
        session, tokens = self.rng.choice(self.sessions)
        text, params = self.text(), self.params()
        tokens += ([] if tokens else [BOS]) + list(text.encode())
        if len(tokens) > 400:
            session.truncate(0)
            tokens[:] = [BOS, *text.encode()]
        reply = session.generate(text, params)
        assert reply.token_ids == self.expected(tokens, params)
        tokens += reply.token_ids
        assert session.token_ids == tokens

    def fork(self) -> None:
        session, tokens = self.rng.choice(self.sessions)
        self.sessions = [*self.sessions[-3:], (session.fork(), list(tokens))]

    def save(self) -> None:
        session, tokens = self.rng.choice(self.sessions)
        session.save(self.folder / f"{self.seed}")
        self.sessions[-1] = (self.llm.load_session(self.folder / f"{self.seed}"), list(tokens))

    def poison(self) -> None:
        with pytest.raises(NumericalError):
            self.llm.generate("poison!", self.params())
        with pytest.raises(InvalidRequestError):
            self.llm.generate("x", temperature=-1)

    def embed(self) -> None:
        assert self.llm.embed([self.text() for _ in range(3)]).shape == (3, 8)

    def expected(self, tokens: list[int], params: SamplingParams) -> tuple[int, ...]:
        return tuple(greedy(tokens, params.max_tokens or 0))


@pytest.mark.parametrize("pages", [40, 2000])
def test_everything_at_once(pages, tmp_path):
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"seed {seed}")

    def poisoned(history: np.ndarray) -> bool:
        return len(history) > 7 and bytes(history[1:8].astype(np.uint8)) == b"poison!"

    with fake_llm(pages=pages, poison=poisoned) as llm:
        workers = [Worker(llm, seed + i, tmp_path) for i in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
        assert all(not worker.is_alive() for worker in workers)
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        assert sum(worker.done for worker in workers) > 20
        settled(llm)
