"""The conformance suite on the CPU device, whose activations and KV are int8."""
from __future__ import annotations

from edge_runtime.devices.cpu import CpuDevice
from tests.devices.conformance import DeviceConformance


class TestCpuDevice(DeviceConformance):
    gap, error, exact = 0.3, 0.35, True

    def open(self, file, config, max_rows=512):
        return CpuDevice(file, config, threads=1, max_rows=max_rows)
