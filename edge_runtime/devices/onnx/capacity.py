"""How much memory a provider's device has. ONNX Runtime tells it on Windows alone; elsewhere the driver does."""
from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from edge_runtime.devices.accelerator import DeviceCapacity
from edge_runtime.devices.onnx.providers import Provider, hardware, register
from edge_runtime.errors import DeviceError, MissingExtraError

NVIDIA = 0x10DE  # PCI's number of the maker
MIB = 1 << 20
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
SMI_SECONDS = 10.0


def capacity(provider: Provider, drm: Path = Path("/sys/class/drm")) -> DeviceCapacity:
    """Of the device that the provider would take here. A provider that is not installed, or whose device tells nothing,
    has no figures."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if provider.memory == "cpu" or apple:
        return DeviceCapacity(shared=True)
    try:
        register(provider)
        devices = hardware(provider)
    except (MissingExtraError, DeviceError):
        return DeviceCapacity(shared=False)
    if not devices:
        return _of_nvidia() if provider.name == "cuda" else DeviceCapacity(shared=False)
    return of_device(devices[0].device, drm)


def of_device(device: Any, drm: Path) -> DeviceCapacity:
    """Of an OrtHardwareDevice."""
    if device.type.name == "CPU":  # software that calls itself a GPU
        return DeviceCapacity(shared=True)
    told = str(device.metadata.get("DxgiVideoMemory", "")).split(" ")[0]
    if told.isdigit() and int(told):
        return DeviceCapacity(False, int(told) * MIB)
    if device.vendor_id == NVIDIA:
        return _of_nvidia()
    return _of_drm(drm, device.vendor_id)


def _of_drm(drm: Path, vendor_id: int) -> DeviceCapacity:
    """What Linux's amdgpu driver says of the first card of a maker."""
    for card in sorted(drm.glob("card[0-9]*/device")):
        try:
            if int((card / "vendor").read_text(), 16) == vendor_id:
                total = int((card / "mem_info_vram_total").read_text())
                return DeviceCapacity(False, total, max(0, total - int((card / "mem_info_vram_used").read_text())))
        except (OSError, ValueError):
            continue
    return DeviceCapacity(shared=False)


def _of_nvidia() -> DeviceCapacity:
    """What NVIDIA's driver says of the first GPU."""
    try:
        told = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
        total, free = (int(value) * MIB for value in told.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return DeviceCapacity(shared=False)
    return DeviceCapacity(False, total, free)
