"""What the batcher puts into steps, driven step by step without a thread."""
from __future__ import annotations

import os
import random

import numpy as np
import pytest

from edge_runtime.batching import Batcher, Schedule
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.offload.kv_cache import KVCache
from edge_runtime.sequence import Priority, Sequence, State, Wants
from tests.fake_device import FakeDevice, greedy


class Driver:
    """Runs a batcher on the fake device, greedily; sequences end after `count` tokens."""

    def __init__(self, pages: int = 1000, max_rows: int = 512, max_batch: int = 32, uniform: bool = False):
        self.device = FakeDevice(max_rows=max_rows)
        self.cache = KVCache(self.device.kv_layout, pages * self.device.kv_layout.page_bytes)
        self.batcher = Batcher(self.cache, max_rows, max_batch, uniform)
        self.left: dict[Sequence, int] = {}
        self.failed: list[Sequence] = []

    def add(self, prompt, count: int = 5, priority: Priority = Priority.INTERACTIVE, wants: Wants = Wants.TOKEN):
        seq = Sequence(prompt, self.cache.table(), self.cache.root, priority=priority, wants=wants)
        self.left[seq] = count
        self.batcher.add(seq)
        return seq

    def end(self, seq: Sequence) -> None:
        self.batcher.remove(seq)
        seq.table.release()
        del self.left[seq]

    def step(self) -> Schedule:
        schedule = self.batcher.schedule()
        for seq, error in schedule.failed:
            assert isinstance(error, OutOfMemoryError)
            self.failed.append(seq)
            self.end(seq)
        if schedule.parts:
            result = self.device.run(schedule.step)
            self.batcher.commit(schedule)
            rows = iter(result.logits)
            for part in schedule.parts:
                if part.logits:
                    part.sequence.append(int(next(rows).argmax()))
                    self.left[part.sequence] -= 1
                    if not self.left[part.sequence]:
                        self.end(part.sequence)
                elif part.sequence.wants is not Wants.TOKEN and not part.sequence.pending:
                    self.end(part.sequence)
        return schedule

    def finish(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if self.batcher.idle:
                break
            schedule = self.step()
            assert schedule.parts or schedule.failed, "nothing to do, and not idle"
        assert self.batcher.idle
        self.cache.check_integrity([])
        assert not self.batcher._computing

    def sizes(self, schedule: Schedule) -> dict[Sequence, int]:
        return {part.sequence: part.count for part in schedule.parts}


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def tail(seq: Sequence) -> list[int]:
    return seq.tokens[seq.prompt_length:].tolist()


def test_chunks_end_at_page_boundaries():
    driver = Driver(max_rows=200)
    seq = driver.add(prompt(500))
    other = driver.add(prompt(70, 1))
    assert driver.sizes(driver.step()) == {seq: 192}
    assert driver.sizes(driver.step()) == {seq: 192}
    assert driver.sizes(driver.step()) == {seq: 116, other: 70}
    driver.finish()
    assert tail(seq) == greedy(prompt(500), 5) and tail(other) == greedy(prompt(70, 1), 5)


def test_tiny_step_sizes_still_make_progress():
    driver = Driver(max_rows=8, max_batch=4)
    seqs = [driver.add(prompt(100 + i, i)) for i in range(6)]
    driver.finish()
    assert all(tail(seq) == greedy(prompt(100 + i, i), 5) for i, seq in enumerate(seqs))


def test_interactive_decoding_bounds_prompt_rows():
    driver = Driver()
    fast = driver.add(prompt(10), 50)
    driver.step()
    slow = driver.add(prompt(600, 1))
    assert driver.sizes(driver.step()) == {fast: 1, slow: 128}
    driver.end(fast)
    assert driver.sizes(driver.step()) == {slow: 472}


def test_batch_decoding_leaves_all_rows_to_prompts():
    driver = Driver()
    slow = driver.add(prompt(10), 50, Priority.BATCH)
    driver.step()
    other = driver.add(prompt(600, 1), 5, Priority.BATCH)
    assert driver.sizes(driver.step()) == {slow: 1, other: 448}


def test_interactive_first_but_batch_is_not_starved():
    driver = Driver(max_batch=2)
    batch = driver.add(prompt(200, 99), 20, Priority.BATCH)
    seeds = iter(range(10_000))
    for _ in range(400):
        while driver.batcher.waiting < 5:
            driver.add(prompt(100, next(seeds)), 3)
        driver.step()
        if batch.state is State.FINISHED:
            break
    assert tail(batch) == greedy(prompt(200, 99), 20)


@pytest.mark.parametrize(("pages", "max_batch"), [(1000, 3), (8, 32)])
def test_an_interactive_request_does_not_wait_for_batch_requests(pages, max_batch):
    driver = Driver(pages=pages, max_batch=max_batch)
    slow = [driver.add(prompt(100, i), 60, Priority.BATCH) for i in range(3)]
    for _ in range(10):
        driver.step()
    urgent = driver.add(prompt(100, 9), 3)
    driver.step()
    driver.step()
    assert urgent.state is State.RUNNING and urgent.length > 100
    assert driver.batcher.preemptions == 1 and slow[-1].state is State.WAITING
    driver.finish()
    for i, seq in enumerate(slow):
        assert tail(seq) == greedy(prompt(100, i), 60)


def test_batch_requests_that_were_pushed_out_often_stay():
    driver = Driver(max_batch=1)
    slow = driver.add(prompt(100), 40, Priority.BATCH)
    for i in range(60):
        driver.step()
        if i % 4 == 0:
            driver.add(prompt(50, i), 1)
    assert slow.state is State.FINISHED and slow.preemptions == 3
    assert tail(slow) == greedy(prompt(100), 40)


def test_batch_prompt_gets_rows_beside_a_stream_of_interactive_prompts():
    driver = Driver(max_batch=8, max_rows=128)
    batch = driver.add(prompt(1000, 99), 1, Priority.BATCH)
    driver.step()
    seeds = iter(range(10_000))
    for _ in range(300):
        while driver.batcher.waiting < 3:
            driver.add(prompt(128, next(seeds)), 1)
        driver.step()
        if batch.state is State.FINISHED:
            return
    pytest.fail("the batch prompt never got its rows")


def test_equal_prefixes_arriving_at_once_are_computed_once():
    driver = Driver()
    shared = prompt(640)
    seqs = [driver.add(shared + prompt(10, i + 1)) for i in range(20)]
    driver.finish()
    computed = sum(map(sum, driver.device.sizes))
    assert computed <= 640 + 20 * (10 + 5)
    assert [seq.cached_tokens for seq in seqs] == [0] + [640] * 19
    for i, seq in enumerate(seqs):
        assert tail(seq) == greedy(shared + prompt(10, i + 1), 5)


def test_waiting_for_a_prefix_ends_with_its_owner():
    driver = Driver(max_rows=64)
    first = driver.add(prompt(640))
    second = driver.add(prompt(640))
    third = driver.add(prompt(30, 5))
    driver.step()
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    driver.end(first)
    driver.finish()
    assert second.cached_tokens == 64
    assert tail(second) == greedy(prompt(640), 5) and tail(third) == greedy(prompt(30, 5), 5)


def test_a_wholly_cached_prompt_computes_its_last_page_again():
    driver = Driver()
    driver.add(prompt(128))
    driver.finish()
    again = driver.add(prompt(128))
    assert driver.sizes(driver.step()) == {again: 64}
    driver.finish()
    assert tail(again) == greedy(prompt(128), 5)


@pytest.mark.parametrize(("uniform", "cached"), [(False, 64), (True, 192)])
def test_generated_pages_are_shared_only_where_they_equal_a_prompts(uniform, cached):
    driver = Driver(uniform=uniform)
    first = driver.add(prompt(100), 120)
    driver.finish()
    again = driver.add(first.tokens.tolist()[:210])
    driver.finish()
    assert again.cached_tokens == cached and tail(again) == greedy(first.tokens.tolist()[:210], 5)


def test_nothing_on_top_of_generated_tokens_is_shared():
    driver = Driver()
    first = driver.add(prompt(100), 20)
    table = first.table
    while first.state is not State.FINISHED:
        if driver.left[first] == 1:
            table = first.table.fork()
        driver.step()
    longer = Sequence([*first.tokens.tolist(), *prompt(200, 1)], table, driver.cache.root)
    driver.left[longer] = 5
    driver.batcher.add(longer)
    driver.finish()
    assert tail(longer) == greedy(longer.tokens[:longer.prompt_length].tolist(), 5)
    assert driver.cache.index.match(longer.page_keys()) == 1


def test_hidden_states_are_computed_for_every_token():
    driver = Driver()
    driver.add(prompt(200))
    driver.finish()
    embedded = driver.add(prompt(200), wants=Wants.HIDDEN)
    schedule = driver.step()
    assert driver.sizes(schedule) == {embedded: 200}
    assert schedule.step.slices[0].hidden and schedule.step.slices[0].logits == "none"
    driver.finish()


def test_preempted_sequences_give_the_same_text():
    driver = Driver(pages=12)
    seqs = [driver.add(prompt(100 + i, i), 150, Priority(i % 2)) for i in range(5)]
    driver.finish()
    assert driver.batcher.preemptions > 0
    for i, seq in enumerate(seqs):
        assert tail(seq) == greedy(prompt(100 + i, i), 150)


def test_the_youngest_of_the_lowest_priority_is_preempted():
    driver = Driver(pages=6)
    old = driver.add(prompt(60), 100, Priority.BATCH)
    young = driver.add(prompt(60, 1), 100, Priority.BATCH)
    urgent = driver.add(prompt(60, 2), 250)
    while not driver.batcher.preemptions:
        driver.step()
    assert (young.state, old.state, urgent.state) == (State.WAITING, State.RUNNING, State.RUNNING)
    driver.finish()
    assert tail(young) == greedy(prompt(60, 1), 100)


def test_slices_say_whether_they_are_a_prompts_even_when_computed_again():
    driver = Driver(pages=4)
    seen = []
    run = driver.device.run
    driver.device.run = lambda step: (seen.extend(step.slices), run(step))[1]
    seqs = [driver.add(prompt(length, length), 120) for length in (40, 30)]
    driver.finish()
    assert driver.batcher.preemptions
    assert all(tail(seq) == greedy(prompt(seq.prompt_length, seq.prompt_length), 120) for seq in seqs)
    assert {(part.position, len(part.token_ids)) for part in seen if part.prompt} == {(0, 40), (0, 30)}
    assert any(len(part.token_ids) > 1 for part in seen if not part.prompt)


def test_a_sequence_that_can_never_fit_fails_and_the_next_runs():
    driver = Driver(pages=3)
    big, small = driver.add(prompt(300)), driver.add(prompt(30, 1))
    driver.finish()
    assert driver.failed == [big] and tail(small) == greedy(prompt(30, 1), 5)
    growing = driver.add(prompt(100, 2), 500)
    driver.finish()
    assert driver.failed == [big, growing]


def test_cached_prefixes_make_way_for_sequences():
    driver = Driver(pages=10)
    for i in range(20):
        seq = driver.add(prompt(300, i))
        driver.finish()
        assert tail(seq) == greedy(prompt(300, i), 5)
    assert driver.cache.index.evicted > 0 and not driver.batcher.preemptions


@pytest.mark.parametrize("run", range(3))
def test_random_traffic_gives_every_sequence_its_own_text(run):
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30))) + run
    print(f"seed {seed}")
    rng = random.Random(seed)
    driver = Driver(pages=rng.choice([14, 30, 300]), max_rows=rng.choice([70, 130, 512]),
                    max_batch=rng.choice([2, 5, 32]), uniform=rng.random() < 0.5)
    shared = [prompt(length, 1000 + length) for length in (64, 130, 200)]
    expected: dict[Sequence, tuple[list[int], int]] = {}
    for _ in range(300):
        if rng.random() < 0.3 and len(expected) < 50:
            text = rng.choice([[], *shared]) + prompt(rng.randint(1, 150), rng.randrange(50))
            count = rng.randint(1, 80)
            expected[driver.add(text, count, Priority(rng.randrange(2)))] = (text, count)
        if rng.random() < 0.03 and driver.left:
            gone = rng.choice(list(driver.left))
            driver.end(gone)
            del expected[gone]
        driver.step()
        driver.cache.check_integrity([seq.table for seq in driver.batcher.running])
    driver.finish()
    assert not driver.failed
    for seq, (text, count) in expected.items():
        assert tail(seq) == greedy(text, count), seed
