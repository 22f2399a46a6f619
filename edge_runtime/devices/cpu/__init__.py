"""The CPU device: a whole step in one nogil call."""
from __future__ import annotations

from edge_runtime.devices.cpu.device import CpuDevice

__all__ = ["CpuDevice"]
