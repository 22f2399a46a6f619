"""What every device must fulfil. Subclass `DeviceConformance` (whole steps) or `AcceleratorConformance` (parts of a
step) in a test file, say how to open the device and how exact it is, and pytest runs all of this on it.

    class TestMine(DeviceConformance):
        gap, error = 1e-3, 1e-4
        def open(self, file, config, **options): return MyDevice(file, config, **options)
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.devices.accelerator import AttendPart
from edge_runtime.devices.base import SequenceSlice, Step, StepResult
from edge_runtime.errors import DeviceError, EngineStoppedError, OutOfMemoryError, TokenizerError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.offload.page_table import PageTable
from edge_runtime.offload.pages import PagePool
from tests.gguf_factory import LLAMA3_ROPE, write_model

MODELS: dict[str, dict[str, Any]] = {
    "llama Q4_0, llama3 rope": dict(rope=LLAMA3_ROPE),
    "qwen2 Q8_0, biases": dict(architecture="qwen2", types="Q8_0", heads=6, kv_heads=2, head_size=32, width=192,
                               tied=False),
    "qwen3 Q4_K, QK norm": dict(architecture="qwen3", types={"default": "Q4_K", "v": "Q6_K"}, width=256, ffn=256,
                                heads=4, kv_heads=2),
    "llama Q5_1, yarn": dict(types="Q5_1", rope={"yarn": {"factor": 4.0, "original_context": 32}}, kv_heads=4),
}


class Subject:
    """An open device with a page pool, driven as the engine does."""

    def __init__(self, device: Any, file: GGUFFile):
        self.device, self.file, self.reference = device, file, ReferenceModel.load(file)
        self.pool = PagePool(device.kv_layout, 64 << 20)
        self._keys: dict[int, int] = {}  # of tables, by their identity
        self._tables: list[PageTable] = []  # kept alive, so that identities stay theirs

    def table(self) -> PageTable:
        return PageTable(self.pool)

    def slice(self, table: PageTable, ids: Any, prompt: bool = True, logits: str = "all",
              hidden: bool = False) -> SequenceSlice:
        table.reserve(len(ids))
        position = table.length
        table.advance(len(ids))
        return SequenceSlice(np.asarray(ids, np.int32), position, table.addresses, logits, hidden, prompt,
                             key=self.key(table))

    def key(self, table: PageTable) -> int:
        if id(table) not in self._keys:
            self._tables.append(table)
        return self._keys.setdefault(id(table), len(self._keys) + 1)

    def release(self, table: PageTable) -> None:
        """A sequence ends: devices that keep something of it are told, before its pages go."""
        if hasattr(self.device, "forget"):
            self.device.forget(self.key(table))
        table.release()

    def run(self, *slices: SequenceSlice) -> StepResult:
        """All of a step: what a device leaves unfinished is given to it again."""
        logits: dict[int, np.ndarray] = {}
        hidden: dict[int, np.ndarray] = {}
        left = list(range(len(slices)))
        while True:
            step = Step(tuple(slices[i] for i in left))
            result = self.device.run(step)
            done = left if result.finished is None else [left[i] for i in result.finished]
            assert done or not left, "a step brings something to its end"
            row = state = 0
            for i in done:
                n = Step((slices[i],)).logit_rows
                logits[i], row = result.logits[row:row + n].copy(), row + n
                if slices[i].hidden:
                    n = len(slices[i].token_ids)
                    assert result.hidden is not None
                    hidden[i], state = result.hidden[state:state + n].copy(), state + n
            assert len(result.logits) == row
            left = [i for i in left if i not in done]
            if not left:
                break
        empty = [np.empty((0, self.device.vocab_size), np.float32)]
        return StepResult(np.concatenate([logits[i] for i in range(len(slices))] or empty),
                          np.concatenate([hidden[i] for i in sorted(hidden)]) if hidden else None)

    def prompt(self, ids: Any, table: PageTable | None = None, cuts: tuple[int, ...] = ()) -> np.ndarray:
        table = table or self.table()
        bounds = [0, *cuts, len(ids)]
        return np.concatenate([self.run(self.slice(table, ids[a:b])).logits for a, b in pairwise(bounds)])


class DeviceConformance:
    """gap: largest difference of the reference's two best logits at which another token may be the best. error: of
    logits whose spread is about 1, against the float reference. exact: the device promises the same bits in any
    company."""

    gap = 1e-3
    error = 1e-4
    exact = False
    models = tuple(MODELS)
    tokens = 12  # decoded for each

    def open(self, file: GGUFFile, config: Any, **options: Any) -> Any:
        raise NotImplementedError

    @contextmanager
    def subject(self, path: Path, *, model: str = "llama Q4_0, llama3 rope", **options: Any) -> Iterator[Subject]:
        file = GGUFFile(write_model(path / "m.gguf", **MODELS[model]))
        device = self.open(file, config_from_gguf(file), **options)
        try:
            yield Subject(device, file)
        finally:
            device.close()
            file.close()

    def close_to(self, got: np.ndarray, want: np.ndarray) -> None:
        assert got.shape == want.shape
        assert np.abs(got - want).max() < self.error * max(1.0, float(want.std()))

    def same(self, got: np.ndarray, want: np.ndarray) -> None:
        """Two results of the device itself."""
        assert np.array_equal(got, want) if self.exact else np.abs(got - want).max() < self.error

    def test_greedy_tokens_are_those_of_the_reference(self, tmp_path):
        for model in self.models:
            with self.subject(tmp_path, model=model) as s:
                ids = list(np.random.default_rng(1).integers(0, 260, 70))
                table = s.table()
                logits = s.prompt(ids, table)[-1]
                for _ in range(self.tokens):
                    want = s.reference.forward(ids)[-1]
                    best = np.sort(want)[-2:]
                    token = int(want.argmax())
                    assert int(logits.argmax()) == token or best[1] - best[0] < self.gap, model
                    ids.append(token)
                    logits = s.run(s.slice(table, [token], prompt=False, logits="last")).logits[0]

    def test_prompts_in_chunks_of_any_size(self, tmp_path):
        ids = np.random.default_rng(2).integers(0, 260, 100)
        with self.subject(tmp_path) as s:
            want = s.reference.forward(ids)
            for cuts in ((), (64,), (1, 2, 65, 99), (31, 32, 33)):
                self.close_to(s.prompt(ids, cuts=cuts), want)

    def test_many_sequences_in_one_step_do_not_touch_each_other(self, tmp_path):
        seed = 3
        print("seed", seed)
        rng = np.random.default_rng(seed)
        with self.subject(tmp_path) as s:
            lengths = [1, 3, 64, 65, 90, 127, 128, 17, 40, 5]
            histories = [rng.integers(0, 260, n + 4) for n in lengths]
            tables = [s.table() for _ in histories]
            for table, history, n in zip(tables, histories, lengths):
                s.prompt(history[:n], table)
            want = [s.reference.forward(history) for history in histories]
            for step in range(4):
                turn = rng.permutation(len(histories))[: 10 - 2 * step]
                late = rng.integers(0, 260, 30)
                parts = [s.slice(tables[i], histories[i][tables[i].length:][:1], prompt=False) for i in turn]
                result = s.run(*parts, s.slice(s.table(), late))
                for row, i in enumerate(turn):
                    self.close_to(result.logits[row], want[i][tables[i].length - 1])
                self.close_to(result.logits[len(turn):], s.reference.forward(late))

    def test_a_row_is_the_same_alone_and_in_company(self, tmp_path):
        rng = np.random.default_rng(4)
        with self.subject(tmp_path) as s:
            histories = [rng.integers(0, 260, n) for n in (3, 70, 130)]
            tables = [s.table() for _ in histories]
            for table, history in zip(tables, histories):
                s.prompt(history, table)
            twins = [table.fork() for table in tables]
            tokens = rng.integers(0, 260, 3)
            alone = [s.run(s.slice(t, tokens[i:i + 1], prompt=False)).logits[0] for i, t in enumerate(tables)]
            together = s.run(*(s.slice(twins[i], tokens[i:i + 1], prompt=False) for i in (2, 0, 1))).logits
            for row, i in enumerate((2, 0, 1)):
                self.same(together[row], alone[i])

    def test_rows_that_asked_get_logits_and_hidden_states(self, tmp_path):
        ids = np.random.default_rng(5).integers(0, 260, 20)
        with self.subject(tmp_path) as s:
            trace = s.reference.trace(ids)
            result = s.run(s.slice(s.table(), ids, logits="last"), s.slice(s.table(), ids, logits="none", hidden=True),
                           s.slice(s.table(), ids, logits="all"))
            self.close_to(result.logits, np.concatenate([trace.logits[-1:], trace.logits]))
            assert result.hidden is not None
            self.close_to(result.hidden, trace.normed)
            assert s.run(s.slice(s.table(), ids, logits="none")).logits.shape == (0, s.device.vocab_size)

    def test_forks_prefixes_and_truncation(self, tmp_path):
        rng = np.random.default_rng(6)
        with self.subject(tmp_path) as s:
            base, more, other = (rng.integers(0, 260, n) for n in (100, 20, 20))
            table = s.table()
            s.prompt(base, table)
            fork = table.fork()
            self.close_to(s.prompt(more, table), s.reference.forward(np.concatenate([base, more]))[100:])
            self.close_to(s.prompt(other, fork), s.reference.forward(np.concatenate([base, other]))[100:])
            table.truncate(70)
            self.close_to(s.prompt(other, table), s.reference.forward(np.concatenate([base[:70], other]))[70:])
            shared = s.table()
            shared.adopt([s.pool.share(page) for page in fork.pages[:1]])  # a cached prefix of one page
            self.close_to(s.prompt(base[64:], shared), s.reference.forward(base)[64:])

    def test_a_sequence_may_end_at_any_time_and_others_take_its_place(self, tmp_path):
        rng = np.random.default_rng(7)
        with self.subject(tmp_path) as s:
            live: dict[int, tuple[PageTable, list[int]]] = {}
            for round in range(12):
                if round % 3 == 2 and live:
                    table, _ = live.pop(int(rng.choice(list(live))))  # cancelled
                    s.release(table)
                ids = list(rng.integers(0, 260, int(rng.integers(1, 90))))
                live[round] = (s.table(), ids)
                s.prompt(ids, live[round][0])
                tokens = rng.integers(0, 260, len(live))
                result = s.run(*(s.slice(table, [token], prompt=False)
                                 for (table, _), token in zip(live.values(), tokens)))
                for row, ((_, history), token) in enumerate(zip(live.values(), tokens)):
                    history.append(int(token))
                    if row == len(live) - 1 or round % 4 == 0:
                        self.close_to(result.logits[row], s.reference.forward(history)[-1])

    def test_bad_steps_are_refused_and_the_next_works(self, tmp_path):
        ids = np.random.default_rng(8).integers(0, 260, 17)
        with self.subject(tmp_path, max_rows=16) as s:
            with pytest.raises(DeviceError, match="17 rows"):
                s.run(s.slice(s.table(), ids))
            for bad in (-1, 300):
                with pytest.raises(TokenizerError, match=str(bad)):
                    s.run(s.slice(s.table(), [1, bad]))
            assert s.device.run(Step(())).logits.shape == (0, 300)
            self.close_to(s.prompt(ids[:16]), s.reference.forward(ids[:16]))

    def test_the_device_may_be_used_from_any_thread_and_closed_twice(self, tmp_path):
        ids = np.random.default_rng(9).integers(0, 260, 9)
        with self.subject(tmp_path) as s:
            results: list[np.ndarray] = []
            thread = threading.Thread(target=lambda: results.append(s.prompt(ids)))
            thread.start()
            thread.join()
            self.close_to(results[0], s.reference.forward(ids))
            s.device.close()


class AcceleratorConformance:
    """error: of values of the order of 1."""

    error = 1e-4

    def open(self, file: GGUFFile, config: Any, **options: Any) -> Any:
        raise NotImplementedError

    @contextmanager
    def accelerator(self, path: Path, model: str = "qwen3 Q4_K, QK norm", **options: Any) -> Iterator[Any]:
        file = GGUFFile(write_model(path / "m.gguf", **MODELS[model]))
        accelerator = self.open(file, config_from_gguf(file), **{"kv_budget_bytes": 16 << 20, **options})
        try:
            accelerator.reference = ReferenceModel.load(file)
            yield accelerator
        finally:
            accelerator.close()
            file.close()

    def close_to(self, got: np.ndarray, want: np.ndarray) -> None:
        assert got.shape == want.shape
        assert np.abs(got - want).max() < self.error * max(1.0, float(np.abs(want).max()))

    @staticmethod
    def forward(a: Any, ids: np.ndarray, sequence: Any) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """All rows of one sequence through the segments: (hidden, logits, residual stream after each segment)."""
        positions = np.arange(sequence.length, sequence.length + len(ids))
        x, attended, states = a.embed(ids), None, []
        for layer in range(a.layers):
            x, qkv = a.segment(layer, x, attended, positions)
            states.append(a.download(x).copy())
            attended = a.attend(layer, qkv, [AttendPart(sequence, len(ids))])
        rows = np.arange(len(ids))
        hidden, logits = a.head(x, attended, rows, rows)
        sequence.length += len(ids)
        return hidden, logits, states

    def test_segments_give_the_reference_at_every_cut(self, tmp_path):
        for model in MODELS:
            with self.accelerator(tmp_path, model) as a:
                ids = np.random.default_rng(1).integers(0, 260, 40)
                trace = a.reference.trace(ids)

                def work(a=a, ids=ids):
                    sequence = a.kv.open(60)
                    parts = [self.forward(a, ids[i:j], sequence) for i, j in ((0, 25), (25, 26), (26, 40))]
                    return sequence, parts, a.kv.read(sequence, 0, 40)

                sequence, parts, kv = a.submit(work).result()
                self.close_to(np.concatenate([p[0] for p in parts]), trace.normed)
                self.close_to(np.concatenate([p[1] for p in parts]), trace.logits)
                for layer in range(a.layers):
                    self.close_to(np.concatenate([p[2][layer] for p in parts]), trace.hidden[layer])
                self.close_to(kv[:, 0], trace.keys.transpose(0, 2, 1, 3))
                self.close_to(kv[:, 1], trace.values.transpose(0, 2, 1, 3))
                assert sequence.length == 40

    def test_some_rows_attend_elsewhere(self, tmp_path):
        """Two decoded rows attend on the device, one on the host, in the same products."""
        with self.accelerator(tmp_path) as a:
            c, rng = a.config, np.random.default_rng(2)
            histories = [rng.integers(0, 260, n) for n in (9, 30, 50)]

            def work():
                sequences = [a.kv.open(64) for _ in histories]
                for sequence, history in zip(sequences, histories):
                    self.forward(a, history[:-1], sequence)
                host = a.kv.read(sequences[2], 0, len(histories[2]) - 1)
                a.kv.close(sequences[2])
                here = sorted((0, 1), key=lambda i: sequences[i].order)
                rows = [*here, 2]
                ids = np.array([histories[i][-1] for i in rows])
                positions = np.array([len(histories[i]) - 1 for i in rows])
                x, attended = a.embed(ids), None
                for layer in range(a.layers):
                    x, qkv = a.segment(layer, x, attended, positions)
                    q, k, v = np.split(a.download(a.take(qkv, 2, 3))[0], [c.q_width, c.q_width + c.kv_width])
                    k, v = (np.concatenate([host[layer, part], new.reshape(c.kv_heads, 1, -1)], axis=1)
                            for part, new in ((0, k), (1, v)))
                    mine = a.attend(layer, a.take(qkv, 0, 2), [AttendPart(sequences[i]) for i in here])
                    attended = a.join([mine, a.upload(attend(q.reshape(c.heads, -1), k, v)[0].reshape(1, -1))])
                return rows, a.head(x, attended, np.arange(3), np.arange(3))[1]

            rows, logits = a.submit(work).result()
            for row, i in enumerate(rows):
                self.close_to(logits[row], a.reference.forward(histories[i])[-1])

    def test_rows_of_two_layers_are_taken_apart_and_joined(self, tmp_path):
        with self.accelerator(tmp_path) as a:
            data = np.random.default_rng(3).standard_normal((7, 24)).astype(np.float32)

            def work():
                whole = a.upload(data)
                parts = [a.take(whole, 0, 2), a.take(whole, 2, 3), a.take(whole, 3, 7)]
                assert [p.rows for p in parts] == [2, 1, 4]
                return a.download(a.join(parts[::-1]))

            assert np.array_equal(a.submit(work).result(), np.concatenate([data[3:], data[2:3], data[:2]]))

    def test_partial_attention_merges_by_its_log_sum_exp(self, tmp_path):
        with self.accelerator(tmp_path) as a:
            c, rng = a.config, np.random.default_rng(4)
            kv = rng.standard_normal((c.layers, 2, c.kv_heads, 90, c.head_size)).astype(np.float32)
            queries = rng.standard_normal((3, c.heads, c.head_size)).astype(np.float32)

            def work():
                sequence = a.kv.open(90)
                empty = a.attend_partial(1, queries, sequence)
                a.kv.write(sequence, 0, kv[:, :, :, :60])
                a.kv.write(sequence, 60, kv[:, :, :, 60:])
                whole_block = np.ascontiguousarray(kv[1, :, :, :64])
                return (empty, a.attend_partial(1, queries, sequence), a.attend_over(queries, kv[1]),
                        a.attend_partial(1, queries[:1], sequence), a.attend_over(queries[:1], kv[1]),
                        a.attend_over(queries[:1], whole_block))

            (nothing, lowest), *found = a.submit(work).result()
            assert not nothing.any() and np.isneginf(lowest).all()
            # Over KV on the device and over the same from the host; a row alone may take another graph.
            for (out, lse), tokens in zip(found, (90, 90, 90, 90, 64), strict=True):
                for row in range(len(out)):
                    want, want_lse = attend(queries[row], *kv[1, :, :, :tokens])
                    self.close_to(out[row], want)
                    self.close_to(lse[row], want_lse)

    def test_kv_moves_between_device_and_host_and_between_sequences(self, tmp_path):
        with self.accelerator(tmp_path) as a:
            c, rng = a.config, np.random.default_rng(5)
            kv = rng.standard_normal((c.layers, 2, c.kv_heads, 150, c.head_size)).astype(np.float32)
            ids = rng.integers(0, 260, 40)

            def work():
                one, two = a.kv.open(100), a.kv.open(200)
                a.kv.write(one, 0, kv[:, :, :, :64])
                a.kv.grow(one, 150)
                a.kv.write(one, 64, kv[:, :, :, 64:])
                assert (one.length, one.capacity >= 150) == (150, True)
                a.kv.copy(one, two, 70)
                moved = a.kv.read(one, 0, 150), a.kv.read(two, 10, 70)
                away, back = a.kv.open(64), a.kv.open(64)
                self.forward(a, ids[:20], away)
                a.kv.write(back, 0, a.kv.read(away, 0, 20))  # the same sequence, gone to the host and come back
                a.kv.close(away)
                return *moved, self.forward(a, ids[20:], back)[1]

            first, second, logits = a.submit(work).result()
            assert np.array_equal(first, kv) and np.array_equal(second, kv[:, :, :, 10:70])
            self.close_to(logits, a.reference.forward(ids)[20:])

    def test_the_kv_budget_holds(self, tmp_path):
        with self.accelerator(tmp_path, kv_budget_bytes=1 << 20) as a:
            def work():
                sequences = []
                with pytest.raises(OutOfMemoryError, match="MiB"):
                    while True:
                        assert a.kv.can_open(100) or len(sequences) > 0
                        sequences.append(a.kv.open(100))
                assert len(sequences) == (1 << 20) // a.kv.bytes_for(100)
                assert a.memory().kv_used <= 1 << 20 and not a.kv.can_open(100)
                a.kv.write(sequences[0], 0, np.ones((a.layers, 2, 2, 9, 64), np.float32))
                with pytest.raises(OutOfMemoryError):
                    a.kv.grow(sequences[0], 1000)
                assert (a.kv.read(sequences[0], 0, 9) == 1).all()
                for sequence in sequences:
                    a.kv.close(sequence)
                assert a.kv.used_bytes == 0

            a.submit(work).result()

    def test_bad_calls_are_refused(self, tmp_path):
        with self.accelerator(tmp_path) as a:
            def work():
                sequence = a.kv.open(10)
                _, qkv = a.segment(0, a.embed(np.arange(3)), None, np.arange(3))
                with pytest.raises(ValueError, match="parts of 2"):
                    a.attend(0, qkv, [AttendPart(sequence, 2)])
                with pytest.raises(ValueError, match="twice"):
                    a.attend(0, qkv, [AttendPart(sequence, 2), AttendPart(sequence, 1)])
                sequence.length = sequence.capacity - 1
                with pytest.raises(ValueError, match="grow"):
                    a.attend(0, qkv, [AttendPart(sequence, 3)])
                with pytest.raises(TokenizerError):
                    a.embed(np.array([0, 300]))
                with pytest.raises(ValueError):
                    a.kv.open(1 << 20)
                a.kv.close(sequence)
                with pytest.raises(ValueError, match="closed"):
                    a.kv.read(sequence, 0, 1)

            a.submit(work).result()

    def test_work_runs_in_order_beside_the_caller_and_ends_with_close(self, tmp_path):
        with self.accelerator(tmp_path) as a:
            seen: list[int] = []
            futures = [a.submit(lambda i=i: seen.append(i)) for i in range(20)]
            futures[-1].result()
            assert seen == list(range(20))
            with pytest.raises(ZeroDivisionError):
                a.submit(lambda: 1 // 0).result()
            a.record()
            a.submit(lambda: a.download(a.embed(np.arange(4)))).result()
            timings = a.drain()
            assert [t.kind for t in timings] == ["download"] and all(t.seconds > 0 for t in timings) and not a.drain()
        with pytest.raises(EngineStoppedError):
            a.submit(lambda: None)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One query [H, D] over k, v [K, n, D]: output [H, D] and log-sum-exp [H]."""
    group = len(q) // len(k)
    scores = np.einsum("hd,hnd->hn", q, np.repeat(k, group, axis=0)) * q.shape[1] ** -0.5
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    out = np.einsum("hn,hnd->hd", weights / weights.sum(-1, keepdims=True), np.repeat(v, group, axis=0))
    return out.astype(np.float32), (top[:, 0] + np.log(weights.sum(-1))).astype(np.float32)
