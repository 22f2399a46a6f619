"""A real profile of the bundled model on ONNX Runtime's CPU provider: figures that grow as they must, and agree with
steps that are run."""
from __future__ import annotations

import dataclasses
import logging
import statistics
import time
import warnings

import numpy as np
import pytest

from edge_runtime import profiling
from edge_runtime.devices.accelerator import AttendPart
from edge_runtime.devices.base import KVLayout
from edge_runtime.errors import InvalidRequestError, OutOfMemoryError
from edge_runtime.models import bundled
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload import profiler
from edge_runtime.offload.cost_model import CostModel
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.profile_store import Profile, Setting, path_of, read
from edge_runtime.offload.profiler import Measurement, measure
from tests.offload.test_cost_model import curves

onnx = pytest.importorskip("edge_runtime.devices.onnx")
pytest.importorskip("onnxruntime")
SECONDS = 5.0


class Processors:
    def __init__(self, kv_budget_bytes: int = 1 << 30, context: int | None = None):
        self.file = GGUFFile(bundled.path())
        self.config = config_from_gguf(self.file)
        c = self.config
        self.accelerator = onnx.OnnxAccelerator(self.file, c, "cpu", kv_budget_bytes=kv_budget_bytes, threads=1,
                                                context=context, precision="int8")
        self.host = HostAttention(c, KVLayout(c.layers, c.kv_heads, c.head_size, "int8"))

    def measure(self, seconds: float = SECONDS, **options) -> Measurement:
        return measure(self.accelerator, self.host, self.config, seconds=seconds, **options)

    def close(self) -> None:
        self.host.close()
        self.accelerator.close()
        self.file.close()


@pytest.fixture(scope="module")
def processors():
    both = Processors()
    yield both
    both.close()


@pytest.fixture(scope="module")
def measured(processors):
    told: list[str] = []
    found = processors.measure(progress=told.append)
    assert told and all(name in " ".join(told) for name in ("linear", "head", "host attention", "upload", "bring"))
    return found


def test_it_keeps_to_its_time(measured):
    assert 0 < measured.seconds < 3 * SECONDS


def test_every_figure_is_there_and_above_zero(measured, processors):
    found, c = measured.curves, processors.config
    assert found.layers == c.layers
    assert [rows for rows, _ in found.linear][:4] == [1, 2, 4, 8]
    for name in ("linear", "upload", "download", "bring"):
        assert all(seconds > 0 for _, seconds in getattr(found, name)), name
    for name in ("device_attention", "host_attention", "device_prompt", "host_prompt"):
        points = getattr(found, name)
        assert len({rows for rows, _, _ in points}) > 1 and all(seconds > 0 for *_, seconds in points), name
    assert found.kv_bytes_device == c.layers * 2 * c.kv_width * 4 and found.q_bytes == 4 * (c.q_width + 2 * c.kv_width)
    assert found.kv_bytes_host * 64 == processors.host.layout.page_bytes
    assert found.handover > 0 and found.contention_device >= 1 and found.contention_host >= 1


def test_more_work_takes_longer(measured):
    """Where the work differs by a factor that noise cannot hide."""
    cost = CostModel(measured.curves)
    assert cost.linear(512) > 4 * cost.linear(1)
    assert cost.linear(256) > 2 * cost.linear(16)
    assert cost.device_attention([2048] * 16) > 2 * cost.device_attention([64])
    assert cost.host_attention([2048] * 16) > 4 * cost.host_attention([64])
    assert cost.host_attention_of(64, 512) > 4 * cost.host_attention_of(1, 512)
    assert cost.device_prompt(512, 1024) > 2 * cost.device_prompt(16, 0)
    assert cost.host_prompt(512, 1024) > 4 * cost.host_prompt(16, 0)
    assert cost.bring(2048) > 2 * cost.bring(64)


def test_a_step_that_is_run_takes_what_its_parts_add_up_to(measured, processors):
    """Segment 0 is not a whole layer and the head holds the rest of the last one: counted right, it fits."""
    a, c, rows, tokens = processors.accelerator, processors.config, 4, 512
    cost = CostModel(measured.curves)

    def lap(sequences) -> float:
        began = time.perf_counter()
        x, attended = a.embed(np.zeros(rows, np.int64)), None
        parts = [AttendPart(sequence) for sequence in sequences]
        for layer in range(a.layers):
            x, qkv = a.segment(layer, x, attended, np.full(rows, tokens - 1))
            attended = a.attend(layer, qkv, parts)
        a.head(x, attended, np.arange(rows), np.arange(rows))
        return time.perf_counter() - began

    def laps() -> float:
        sequences = [a.kv.open(tokens) for _ in range(rows)]
        kv = np.random.default_rng(1).standard_normal((c.layers, 2, c.kv_heads, tokens - 1, c.head_size), np.float32)
        for sequence in sequences:
            a.kv.write(sequence, 0, kv)
        found = [lap(sequences) for _ in range(40)][5:]
        for sequence in sequences:
            a.kv.close(sequence)
        return statistics.median(found)

    predicted = c.layers * (cost.linear(rows) + cost.device_attention([tokens] * rows)) + cost.head(rows)
    ratios = []
    for _ in range(5):  # another program may be in the way at one time
        ratios.append(predicted / a.submit(laps).result())
        if 0.5 < ratios[-1] < 2:
            return
    raise AssertionError(f"predicted / measured: {ratios}")


def test_it_leaves_nothing_behind(measured, processors):
    assert processors.accelerator.memory().kv_used == 0
    assert processors.host.call(lambda: 7).result() == 7
    assert processors.accelerator.submit(lambda: 8).result() == 8


def test_a_device_that_answers_late_is_measured_by_chains(processors, monkeypatch):
    """The same device, said to be asynchronous: calls are timed in chains, and the wait for them is taken off."""
    a = processors.accelerator
    monkeypatch.setattr(a, "capabilities", dataclasses.replace(a.capabilities, asynchronous=True))
    cost = CostModel(processors.measure(2.0).curves)
    assert cost.linear(512) > 4 * cost.linear(1) > 0
    assert cost.device_attention([2048] * 16) > 2 * cost.device_attention([64]) > 0
    assert a.memory().kv_used == 0


def test_a_small_pool_is_measured_as_far_as_it_goes_and_said_so():
    both = Processors(kv_budget_bytes=300 * 10240)  # 300 tokens
    try:
        found = both.measure(1.0)
        rows = {rows for rows, _, _ in found.curves.device_attention}
        assert rows == {1} and max(tokens for _, tokens, _ in found.curves.device_attention) <= 256
        text = "\n".join(found.notes)
        assert "device attention, 16 x" in text and "there is no room" in text and "contention" in text
        assert CostModel(found.curves).device_attention([2048] * 4) > 0
    finally:
        both.close()


def test_a_pool_without_room_for_anything_is_an_error_that_says_so():
    both = Processors(kv_budget_bytes=1000)
    try:
        with pytest.raises(OutOfMemoryError, match="Give it more"):
            both.measure(1.0)
        assert both.accelerator.memory().kv_used == 0
    finally:
        both.close()


@pytest.mark.parametrize("seconds", [0, -1, 0.1, float("nan")])
def test_no_time_is_refused(processors, seconds):
    with pytest.raises(InvalidRequestError, match="seconds"):
        processors.measure(seconds)


class TestProfileOf:
    """What is stored is taken, what cannot be used is measured anew."""

    setting = Setting("0123", "onnx:cpu", "int8", "int8", 1, 1)

    @pytest.fixture(autouse=True)
    def counted(self, tmp_path, monkeypatch):
        monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
        self.measured = 0

        def instead(*arguments, **options):
            self.measured += 1
            return Measurement(curves(), 1.0, ())

        monkeypatch.setattr(profiling, "measure", instead)

    def get(self, processors, **options) -> Profile:
        return profiling.profile_of(processors.accelerator, processors.host, processors.config, self.setting, **options)

    def test_once(self, processors):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = self.get(processors)
            assert self.get(processors) == first and self.measured == 1
            assert self.get(processors, fresh=True).curves == first.curves and self.measured == 2

    def test_anew_when_the_machine_changes(self, processors, monkeypatch):
        self.get(processors)
        monkeypatch.setattr(profiling.machine, "processor", lambda: "another processor")
        with pytest.warns(UserWarning, match="processor was .*, here it is another processor.*measured anew"):
            self.get(processors)
        self.get(processors)
        assert self.measured == 2
        assert read(path_of(self.setting)).machine["processor"] == "another processor"

    def test_anew_when_there_is_more_room(self, processors, caplog):
        small, large = Processors(kv_budget_bytes=300 * 10240), Processors(kv_budget_bytes=3000 * 10240)
        try:
            with caplog.at_level(logging.INFO, logger="edge_runtime"):
                assert self.get(small).reach == self.get(small).reach == (0, 256, 0)
                assert self.measured == 1 and "measured anew" not in caplog.text
                found = self.get(large)
                assert self.measured == 2 and found.reach == profiler.reach(large.accelerator, large.config)
                assert "reaches to (0, 256, 0) tokens of KV" in caplog.text and "measured anew" in caplog.text
            assert self.get(small) == self.get(large) == found and self.measured == 2
            short = Processors(kv_budget_bytes=3000 * 10240, context=128)
            try:
                assert max(profiler.reach(short.accelerator, short.config)) == 128
                assert self.get(short) == found
            finally:
                short.close()
        finally:
            small.close()
            large.close()

    def test_anew_when_the_file_is_broken(self, processors):
        self.get(processors)
        path_of(self.setting).write_text("{")
        with pytest.warns(UserWarning, match="not JSON"):
            self.get(processors)
        assert self.measured == 2 and read(path_of(self.setting)).curves == curves()

    def test_without_a_place_to_store(self, processors, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="not stored"):
            assert self.get(processors).curves == curves()
