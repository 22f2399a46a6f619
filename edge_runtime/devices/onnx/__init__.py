"""ONNX Runtime as a device: one registration for every execution provider, CPU, WebGPU, CUDA, OpenVINO and more.

`OnnxAccelerator` hands out the parts of a step (see `devices.accelerator`), `OnnxDevice` runs whole steps for the
engine. Importing this loads nothing of ONNX Runtime.
"""
from __future__ import annotations

from edge_runtime.devices.onnx.accelerator import OnnxAccelerator
from edge_runtime.devices.onnx.device import OnnxDevice
from edge_runtime.devices.onnx.providers import DEVICES, PROVIDERS, provider_of

__all__ = ["DEVICES", "PROVIDERS", "OnnxAccelerator", "OnnxDevice", "provider_of"]
