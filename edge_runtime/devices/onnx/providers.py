"""Execution providers of ONNX Runtime: what each is called, what installs it, and what it can do.

Two ways of registration: a plugin wheel whose library is loaded into `onnxruntime` (WebGPU, OpenVINO, CUDA, QNN), or a
provider that the installed build of onnxruntime brings (CUDA in onnxruntime-gpu, CoreML in the macOS wheel ...).
https://onnxruntime.ai/docs/execution-providers/
"""
from __future__ import annotations

import atexit
import importlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_runtime.errors import DeviceError, MissingExtraError

_LOCK = threading.Lock()
_REGISTERED: set[str] = set()


@dataclass(frozen=True)
class Provider:
    """name: after "onnx:" in LLM(device=...). ep: ONNX Runtime's name. plugins: modules of plugin wheels, first found
    first. extra: of this package, which installs it. memory: where arrays live, as IOBinding calls it.
    operator_attention: GroupQueryAttention runs here; else attention is built from basic operators. options: of the
    provider. fixed_shapes: compiled for one number of rows at a time. kinds: hardware kinds taken, best first. half:
    all its hardware knows half precision."""

    name: str
    ep: str
    extra: str
    package: str
    what: str
    plugins: tuple[str, ...] = ()
    memory: str = "cpu"
    operator_attention: bool = False
    asynchronous: bool = False
    fixed_shapes: bool = False
    kinds: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    half: bool = True

    @property
    def mend(self) -> str:
        return f"pip install 'edge-runtime[{self.extra}]'"


PROVIDERS = {p.name: p for p in (
    Provider("cpu", "CPUExecutionProvider", "onnx", "onnxruntime", "ONNX Runtime's own CPU kernels",
             operator_attention=True),
    Provider("webgpu", "WebGpuExecutionProvider", "webgpu", "onnxruntime-ep-webgpu", "any vendor's GPU over Vulkan, "
             "Direct3D 12 or Metal", ("onnxruntime_ep_webgpu",), "webgpu", True, True, kinds=("GPU", "CPU"),
             half=False),
    Provider("cuda", "CUDAExecutionProvider", "cuda", "onnxruntime-gpu", "NVIDIA GPUs", memory="cuda",
             operator_attention=True, asynchronous=True, kinds=("GPU",)),
    Provider("openvino", "OpenVINOExecutionProvider", "openvino", "onnxruntime-ep-openvino", "Intel CPU, GPU and NPU",
             ("onnxruntime_ep_openvino",), kinds=("CPU", "GPU", "NPU")),
    Provider("qnn", "QNNExecutionProvider", "qnn", "onnxruntime-qnn", "Qualcomm Hexagon NPU", ("onnxruntime_qnn",),
             fixed_shapes=True, kinds=("NPU", "GPU", "CPU")),
    Provider("coreml", "CoreMLExecutionProvider", "onnx", "onnxruntime (macOS)", "Apple GPU and Neural Engine",
             fixed_shapes=True),
    Provider("directml", "DmlExecutionProvider", "directml", "onnxruntime-directml", "any Direct3D 12 GPU on Windows",
             memory="dml", operator_attention=True, asynchronous=True),
    Provider("vitisai", "VitisAIExecutionProvider", "vitisai", "onnxruntime-vitisai", "AMD Ryzen AI NPU",
             fixed_shapes=True),
)}
DEVICES = tuple(f"onnx:{name}" for name in PROVIDERS)
SHORT = tuple(name for name in PROVIDERS if name != "cpu")  # "webgpu" is short for "onnx:webgpu"
PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # OpenVINO's default is bf16


@dataclass(frozen=True)
class Found:
    """A provider on this machine. hardware: what it would run on, "" where it cannot run; problem: why, and the mend;
    version: of the plugin or of onnxruntime."""

    provider: Provider
    version: str | None
    hardware: str = ""
    kind: str = ""
    problem: str = ""


def provider_of(device: str) -> Provider | None:
    """The provider that a device's name means ("onnx:webgpu", or "webgpu"), None where it means none."""
    name = device.removeprefix("onnx:") if device.startswith("onnx:") else device
    return PROVIDERS.get(name) if device.startswith("onnx:") or name in SHORT else None


def runtime() -> Any:
    """The package onnxruntime. MissingExtraError says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "An ONNX device") from error
    return onnxruntime


def register(provider: Provider) -> None:
    """Loads the provider's plugin library, once. MissingExtraError: neither plugin nor a build that has it."""
    ort = runtime()
    with _LOCK:
        if provider.ep in _REGISTERED or provider.name == "cpu":
            return
        module = next((name for name in provider.plugins if find_spec(name) is not None), None)
        if module is not None:
            plugin = importlib.import_module(module)
            try:
                ort.register_execution_provider_library(provider.ep, str(plugin.get_library_path()))
            except Exception as error:
                raise DeviceError(f"{provider.package} cannot be loaded into onnxruntime {ort.__version__}: {error}. "
                                  f"Install matching versions: {provider.mend} --upgrade") from error
            _REGISTERED.add(provider.ep)
        elif provider.ep not in ort.get_available_providers():
            raise MissingExtraError(provider.package, provider.extra, f'device="onnx:{provider.name}"')


def hardware(provider: Provider) -> list[Any]:
    """The OrtEpDevices of a registered provider, best kind first; those of a combined device (AUTO) left out."""
    every = runtime().get_ep_devices()
    found = [d for d in every if d.ep_name == provider.ep and "ov_meta_device" not in d.ep_metadata]
    kind = lambda d: d.device.type.name
    wanted = provider.kinds or ("GPU", "NPU", "CPU")
    return sorted((d for d in found if kind(d) in wanted), key=lambda d: wanted.index(kind(d)))


def add_to(options: Any, provider: Provider, kind: str | None = None) -> str:
    """Asks session options for the provider; returns what it will run on. kind: "CPU", "GPU" or "NPU", where it has
    several. DeviceError where it has none here."""
    if provider.name == "cpu":
        return "CPU"
    devices = [d for d in hardware(provider) if kind in (None, d.device.type.name)]
    if devices:
        options.add_provider_for_devices(devices[:1], provider_options(provider, devices[0].device.type.name))
        return describe(devices[0])
    if not provider.plugins or provider.ep in runtime().get_available_providers():
        options.add_provider(provider.ep, dict(provider.options))
        return provider.what
    raise DeviceError(f'device="onnx:{provider.name}": {provider.package} is installed and finds no '
                      f"{kind or provider.kinds[0]} here. Install the driver, or use device=\"cpu\".")


def provider_options(provider: Provider, kind: str) -> dict[str, str]:
    options = dict(provider.options)
    if provider.name == "openvino":
        options["load_config"] = _openvino_config(kind)
    return options


def describe(device: Any) -> str:
    names = (device.ep_metadata.get("FULL_DEVICE_NAME"), device.device.metadata.get("Description"))
    kind = device.device.type.name
    return next((name for name in names if name), f"{kind} of {device.device.vendor or 'unknown make'}")


def survey() -> list[Found]:
    """Every provider, and whether it could run here. Loads plugins, runs nothing."""
    if find_spec("onnxruntime") is None:
        return [Found(p, None, problem=p.mend) for p in PROVIDERS.values()]
    return [_look(p) for p in PROVIDERS.values()]


def version_of(provider: Provider) -> str | None:
    for name in (provider.package.split(" ")[0], *(plugin.replace("_", "-") for plugin in provider.plugins)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _look(provider: Provider) -> Found:
    version = version_of(provider)
    if provider.name == "cpu":
        return Found(provider, version, "CPU", "CPU")
    try:
        register(provider)
    except MissingExtraError:
        return Found(provider, None, problem=provider.mend)
    except DeviceError as error:
        return Found(provider, version, problem=str(error))
    devices = hardware(provider)
    if devices:
        return Found(provider, version, describe(devices[0]), devices[0].device.type.name)
    if provider.plugins and provider.ep not in runtime().get_available_providers():
        return Found(provider, version, problem=f"no {provider.kinds[0]} found: install its driver")
    return Found(provider, version, provider.what, "GPU" if provider.memory != "cpu" else "NPU")


def best() -> str | None:
    """The device that "auto" takes instead of the CPU: a GPU that WebGPU finds; None where there is none."""
    for name in ("webgpu",):
        if find_spec("onnxruntime") is None or version_of(PROVIDERS[name]) is None:
            continue  # ONNX Runtime itself is not imported for nothing
        found = _look(PROVIDERS[name])
        if found.kind == "GPU" and not found.problem:
            return f"onnx:{name}"
    return None


@cache
def _openvino_config(kind: str) -> str:
    """A file that asks OpenVINO for float32 products, which it takes by path only."""
    handle, path = tempfile.mkstemp(prefix="edge-runtime-openvino-", suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump({kind: PRECISION if kind == "CPU" else {"INFERENCE_PRECISION_HINT": "f32"}}, file)
    atexit.register(Path(path).unlink, missing_ok=True)
    return path
