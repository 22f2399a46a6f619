"""Facts of this machine and installation, for `edge-runtime doctor` and benchmarks."""
from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import EdgeRuntimeError

if TYPE_CHECKING:
    from edge_runtime.devices.accelerator import DeviceCapacity

DISTRIBUTION = "edge-runtime"
VERSIONS = ("numpy", "numba", "llvmlite", "gguf", "tokenizers", "jinja2", "huggingface_hub", "psutil")
DEVELOPER_EXTRAS = ("test", "test-apps", "lint", "docs", "peers", "bench", "browser")


@dataclass(frozen=True)
class InstructionSets:
    """chosen: the one that kernels are made for, or None with the reason in `error`; available: all that run here, best
    first; forced: the value of EDGE_RUNTIME_ISA, where it is set."""

    chosen: str | None
    available: tuple[str, ...]
    forced: str | None
    error: str | None = None


@dataclass(frozen=True)
class KernelCache:
    """kernels: compiled ones for the instruction set in use; nbytes: of their files; writable: False where every start
    compiles anew."""

    folder: str
    kernels: int
    nbytes: int
    writable: bool


@dataclass(frozen=True)
class Extra:
    """An optional part. missing: requirements that are not installed; mend: the command that installs them."""

    name: str
    found: dict[str, str]
    missing: tuple[str, ...]

    @property
    def mend(self) -> str:
        return f"pip install '{DISTRIBUTION}[{self.name}]'"


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def cores() -> tuple[int, int]:
    """Physical and logical cores (0 where the system does not tell)."""
    import psutil

    return psutil.cpu_count(logical=False) or 0, psutil.cpu_count(logical=True) or 0


def instruction_sets() -> InstructionSets:
    from edge_runtime.kernels import isa

    available = tuple(one.name for one in isa.ALL if isa.runs_here(one))
    forced = os.environ.get("EDGE_RUNTIME_ISA")
    try:
        return InstructionSets(isa.current().name, available, forced)
    except EdgeRuntimeError as error:
        return InstructionSets(None, available, forced, str(error))


def kernel_cache(isa_name: str | None) -> KernelCache:
    """What the kernels' cache holds for an instruction set and this Python."""
    from edge_runtime.kernels.compile import cache_folder

    folder = cache_folder() / f"{isa_name}-py{sys.version_info[0]}{sys.version_info[1]}"
    files = list(folder.glob("*")) if folder.is_dir() else []
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return KernelCache(str(cache_folder()), sum(file.suffix == ".nbi" for file in files),
                       sum(file.stat().st_size for file in files), os.access(parent, os.W_OK))


def extras() -> list[Extra]:
    """The optional parts that users may want, as the installed package declares them."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a checkout on sys.path that was never installed
        return []
    parts: dict[str, list[str]] = {}
    for requirement in declared:
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*).*extra == ['\"]([A-Za-z0-9_-]+)['\"]", requirement)
        if match and match[2] not in DEVELOPER_EXTRAS:
            parts.setdefault(match[2], []).append(match[1])
    found = []
    for name, packages in parts.items():
        present = {package: version for package in packages if (version := installed(package))}
        found.append(Extra(name, present, tuple(package for package in packages if package not in present)))
    return found


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    from edge_runtime import __version__

    return {"edge-runtime": __version__, "python": platform.python_version(), "system": platform.platform(),
            **{name: installed(name) or "missing" for name in VERSIONS}}


def devices(isa_name: str | None, threads: int) -> dict[str, str]:
    """Devices that `LLM(device=...)` takes here, and what they are."""
    found = {"cpu": f"{isa_name or 'no instruction set'}, {threads} threads"}
    llama = installed("llama-cpp-python")
    if llama:
        found["llama.cpp"] = f"llama-cpp-python {llama}, whole models"
    return found | onnx_devices()


def onnx_devices() -> dict[str, str]:
    """ONNX Runtime's providers: what each would run on here, or what installs it, or why it does not run."""
    from edge_runtime.devices.onnx.capacity import capacity
    from edge_runtime.devices.onnx.providers import survey

    system = {"coreml": "darwin", "directml": "win32", "vitisai": "win32"}
    found = {}
    for one in survey():
        provider = one.provider
        if system.get(provider.name, sys.platform) != sys.platform:
            continue
        if one.version is None:
            state = f"{provider.what}; missing: {provider.mend}"
        elif one.problem:
            state = f"{provider.package} {one.version}: {one.problem}"
        else:
            state = f"{one.hardware}; {_memory_of(capacity(provider))}; {provider.package} {one.version}"
        found[f"onnx:{provider.name}"] = state
    return found


def _memory_of(found: DeviceCapacity) -> str:
    if found.shared:
        return "memory shared with the processor"
    if found.total is None:
        return "memory of its own, or shared: it does not tell"
    free = "" if found.free is None else f", {found.free / 2**30:.1f} free"
    return f"{found.total / 2**30:.1f} GiB of its own{free}"
