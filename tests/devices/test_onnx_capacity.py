"""How much memory a device has, as its driver tells it."""
from __future__ import annotations

import os
import stat
from types import SimpleNamespace

import pytest

from edge_runtime.devices.accelerator import DeviceCapacity
from edge_runtime.devices.onnx import capacity as capacities
from edge_runtime.devices.onnx.capacity import capacity, of_device
from edge_runtime.devices.onnx.providers import PROVIDERS

MIB = 1 << 20
AMD, NVIDIA, INTEL = 0x1002, 0x10DE, 0x8086


def device(kind="GPU", vendor=AMD, **metadata):
    return SimpleNamespace(type=SimpleNamespace(name=kind), vendor_id=vendor, metadata=metadata)


def card(folder, number, vendor, total=None, used=0):
    place = folder / f"card{number}" / "device"
    place.mkdir(parents=True)
    (place / "vendor").write_text(f"{vendor:#06x}\n")
    if total is not None:
        (place / "mem_info_vram_total").write_text(f"{total}\n")
        (place / "mem_info_vram_used").write_text(f"{used}\n")


def test_what_windows_tells(tmp_path):
    assert of_device(device(DxgiVideoMemory="8151 MB"), tmp_path) == DeviceCapacity(False, 8151 * MIB)
    assert of_device(device(DxgiVideoMemory="0 MB"), tmp_path) == DeviceCapacity(False)


def test_what_linux_tells_of_amd(tmp_path):
    card(tmp_path, 0, INTEL)
    card(tmp_path, 1, AMD, 8 << 30, 3 << 30)
    (tmp_path / "card1-DP-1").mkdir()
    assert of_device(device(), tmp_path) == DeviceCapacity(False, 8 << 30, 5 << 30)
    assert of_device(device(vendor=INTEL), tmp_path) == DeviceCapacity(False)
    assert of_device(device("CPU"), tmp_path) == DeviceCapacity(True)  # software Vulkan


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for the driver's tool")
@pytest.mark.parametrize("said, found", [
    ("echo 24576, 20000", DeviceCapacity(False, 24576 * MIB, 20000 * MIB)),
    ("echo '[N/A], [N/A]'", DeviceCapacity(False)),
    ("exit 9", DeviceCapacity(False)), ("true", DeviceCapacity(False))])
def test_what_nvidias_driver_tells(tmp_path, monkeypatch, said, found):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{said}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert of_device(device(vendor=NVIDIA), tmp_path) == found


def test_providers_in_the_hosts_memory_and_missing_ones(monkeypatch):
    assert capacity(PROVIDERS["cpu"]).shared and capacity(PROVIDERS["openvino"]).shared
    monkeypatch.setattr(capacities, "hardware", lambda provider: [])
    monkeypatch.setattr(capacities, "register", lambda provider: None)
    monkeypatch.setattr(capacities.sys, "platform", "linux")
    assert capacity(PROVIDERS["webgpu"]) == DeviceCapacity(False)
    monkeypatch.setattr(capacities.sys, "platform", "darwin")
    monkeypatch.setattr(capacities.platform, "machine", lambda: "arm64")
    assert capacity(PROVIDERS["webgpu"]) == DeviceCapacity(True)
