"""The hybrid device in every mode and placement: the conformance suite of devices, and what is its own."""
from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime.devices.onnx import OnnxAccelerator
from edge_runtime.errors import DeviceError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.choices import Mode
from edge_runtime.offload.hybrid_device import HybridDevice
from tests.devices.conformance import DeviceConformance, Subject
from tests.gguf_factory import write_model
from tests.offload.scripted import Scripted

KV = 16 << 20
MODES = [Mode.SYNCHRONOUS, Mode.PIPELINED, Mode.OVERLAP, Mode.STREAMING]


def hybrid(file, config, apex, *, kv="fp16", kv_budget=KV, max_rows=512, **options):
    accelerator = OnnxAccelerator(file, config, "cpu", kv_budget_bytes=kv_budget, max_rows=max_rows)
    return HybridDevice(accelerator, config, apex, kv=kv, **options)


class Hybrid(DeviceConformance):
    """Host pages in fp16: about three digits."""

    gap, error = 1e-2, 4e-3
    mode: Mode = Mode.SYNCHRONOUS
    kv = "fp16"

    def apex(self):
        return Scripted(self.mode)

    def open(self, file, config, max_rows=512):
        return hybrid(file, config, self.apex(), kv=self.kv, max_rows=max_rows)


class TestSynchronous(Hybrid):
    pass


class TestPipelined(Hybrid):
    mode = Mode.PIPELINED


class TestOverlap(Hybrid):
    mode = Mode.OVERLAP


class TestStreaming(Hybrid):
    mode = Mode.STREAMING


class TestDeviceOnly(Hybrid):
    """Rows wait until their KV has come to the device."""

    mode = Mode.DEVICE_ONLY

    def apex(self):
        return Scripted(self.mode, host=lambda key: False)


class TestSplit(Hybrid):
    def apex(self):
        return Scripted(self.mode, split=64)


class TestEveryLapAnotherMode(Hybrid):
    """Placements change in the middle of everything; cohorts under way are brought to their end."""

    def apex(self):
        turn = [Mode.OVERLAP, Mode.OVERLAP, Mode.SYNCHRONOUS, Mode.PIPELINED, Mode.OVERLAP, Mode.STREAMING]
        laps = [0]

        def host(key):
            return (key + laps[0]) % 2 == 0

        def mode(lap):
            laps[0] = lap // 3
            return turn[lap % len(turn)]

        return Scripted(mode, host=host)


class TestInt8(Hybrid):
    """int8 on the host: its own error."""

    kv = "int8"
    gap, error = 0.3, 0.1


class TestNoRoomOnTheDevice(Hybrid):
    def open(self, file, config, max_rows=512):
        return hybrid(file, config, self.apex(), kv=self.kv, kv_budget=1, max_rows=max_rows)


def test_a_row_that_goes_on_on_the_host_is_caught_up_with(tmp_path):
    """Its KV comes page by page while it runs, and one token more than it had before each lap."""
    with GGUFFile(write_model(tmp_path / "m.gguf")) as file:
        home = [True]
        device = hybrid(file, config_from_gguf(file), Scripted(Mode.SYNCHRONOUS, host=lambda key: home[0]))
        s = Subject(device, file)
        ids = np.random.default_rng(1).integers(0, 260, 700)
        want = s.reference.forward(ids)
        table = s.table()
        s.prompt(ids[:600], table, cuts=(300,))
        device.accelerator.submit(lambda: device._copies.drop(s.key(table))).result()
        places = []
        for at in range(600, 612):
            home[0] = at < 604
            logits = s.run(s.slice(table, ids[at:at + 1], prompt=False)).logits[0]
            assert np.abs(logits - want[at]).max() < 4e-3
            places.append(len(device.apex.choices[-1].device))
        assert places == [0] * 7 + [1] * 5  # 604 tokens in pieces of 256: three laps
        device.close()


def test_two_slices_of_one_key_are_refused(tmp_path):
    with GGUFFile(write_model(tmp_path / "m.gguf")) as file:
        device = hybrid(file, config_from_gguf(file), Scripted(Mode.SYNCHRONOUS))
        s = Subject(device, file)
        table = s.table()
        with pytest.raises(DeviceError, match="has one"):
            s.run(s.slice(table, [1]), s.slice(table, [2]))
        device.close()
