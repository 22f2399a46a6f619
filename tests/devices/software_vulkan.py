"""WebGPU without a GPU: SwiftShader, the software Vulkan that Chromium brings, as ONNX Runtime's plugin finds it."""
from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import pytest

FOLDERS = tuple(map(Path, ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/usr/lib64/chromium-browser",
                           "/opt/google/chrome", "/opt/chromium.org/chromium")))


def use_software_vulkan() -> None:
    """Sets this process up before the plugin looks for an adapter. Fails the test where Chromium is not installed."""
    pytest.importorskip("onnxruntime_ep_webgpu")
    folder = next((f for f in FOLDERS if (f / "vk_swiftshader_icd.json").is_file()), None)
    if folder is None:
        pytest.fail("no SwiftShader: install Chromium (apt-get install chromium)")
    os.environ.setdefault("VK_ICD_FILENAMES", str(folder / "vk_swiftshader_icd.json"))
    os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
    try:
        ctypes.CDLL("libvulkan.so.1", ctypes.RTLD_GLOBAL)
    except OSError:  # the system has no loader: Chromium's own
        ctypes.CDLL(str(folder / "libvulkan.so.1"), ctypes.RTLD_GLOBAL)
