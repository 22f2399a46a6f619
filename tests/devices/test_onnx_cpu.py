"""The conformance suite on ONNX Runtime's CPU provider: one session, segments, and pinned to one core."""
from __future__ import annotations

import os
import threading

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime.devices.onnx import OnnxAccelerator, OnnxDevice
from tests.devices.conformance import AcceleratorConformance, DeviceConformance

KV = 8 << 20


class TestWholeModel(DeviceConformance):
    form = "whole"

    def open(self, file, config, max_rows=512):
        return OnnxDevice(OnnxAccelerator(file, config, "cpu", kv_budget_bytes=KV, forms=(self.form,),
                                          max_rows=max_rows), self.form)


class TestSegments(TestWholeModel):
    form = "segments"


class TestLittleMemory(TestWholeModel):
    """Room for two or three sequences: steps run in parts, what left is computed again."""

    def open(self, file, config, max_rows=512):
        accelerator = OnnxAccelerator(file, config, "cpu", kv_budget_bytes=1, forms=("segments",), max_rows=max_rows)
        accelerator.kv.budget_bytes = 2 * accelerator.kv.bytes_for(129)
        return OnnxDevice(accelerator, "segments")


class TestInt8Products(TestWholeModel):
    """Activations rounded to 8 bits: about the CPU device's own error."""

    gap, error = 0.3, 0.3

    def open(self, file, config, max_rows=512):
        return OnnxDevice(OnnxAccelerator(file, config, "cpu", kv_budget_bytes=KV, forms=("whole",), precision="int8",
                                          max_rows=max_rows))


class TestAccelerator(AcceleratorConformance):
    def open(self, file, config, **options):
        return OnnxAccelerator(file, config, "cpu", **options)

    @pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no thread affinity")
    def test_a_second_processor_of_one_core(self, tmp_path):
        core = max(os.sched_getaffinity(0))
        with self.accelerator(tmp_path, cores=(core,), threads=1) as a:
            assert a.submit(lambda: os.sched_getaffinity(0)).result() == {core}
            assert len(os.sched_getaffinity(0)) == os.cpu_count() or core in os.sched_getaffinity(0)
            begun, go = threading.Event(), threading.Event()

            def work():
                begun.set()
                assert go.wait(20)
                return a.kv.open(10).capacity

            future = a.submit(work)  # the caller is free while the accelerator works
            assert begun.wait(20) and not future.done()
            go.set()
            assert future.result() >= 10


class TestAcceleratorOfFixedRows(AcceleratorConformance):
    """As NPUs need it: compiled for a few numbers of rows."""

    def open(self, file, config, **options):
        return OnnxAccelerator(file, config, "cpu", fixed_rows=True, **options)
