"""The profile of a model on a device here: the stored one, or measured now and stored."""
from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from edge_runtime import machine
from edge_runtime.devices.accelerator import Accelerator
from edge_runtime.devices.base import KV_DTYPES, KVLayout
from edge_runtime.devices.onnx.capacity import capacity
from edge_runtime.devices.onnx.providers import Provider
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.config import ModelConfig, config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload import profile_store
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.plan import memory
from edge_runtime.offload.planner import OffloadOptions
from edge_runtime.offload.profile_store import Profile, Setting
from edge_runtime.offload.profiler import LEAST_SECONDS, MEMORY_SHARE, MOST_TOKENS, SECONDS, measure, reach

LOG = logging.getLogger("edge_runtime")
Progress = Callable[[str], None]


def machine_facts(accelerator: Accelerator) -> dict[str, str]:
    """What a profile holds for: the processor, its memory and instruction set, the device, the software that both run.
    Words of this machine alone; no name of it or of its user."""
    from edge_runtime import __version__

    physical, logical = machine.cores()
    runs, what = machine.instruction_sets(), accelerator.capabilities
    packages = {name: version for name in ("onnxruntime", "onnxruntime-gpu", "numba", "llvmlite")
                if (version := machine.installed(name))}
    return {"processor": machine.processor(), "cores": f"{physical} of {logical}",
            "instruction set": runs.chosen or "none", "memory": f"{round(memory()[0] / 2**30)} GiB",
            "system": f"{platform.system()} {platform.machine()}", "device": what.name, "provider": what.provider,
            "hardware": what.hardware, "edge-runtime": __version__, **packages}


def profile_of(accelerator: Accelerator, host: HostAttention, config: ModelConfig, setting: Setting, *,
               fresh: bool = False, seconds: float = SECONDS, progress: Progress | None = None) -> Profile:
    """A stored profile is taken unless `fresh`, or it was measured with room for less KV on the device than there
    is now; a broken or a foreign one is warned of. A new one is stored; where that fails, a warning says so and the
    profile is good for now. seconds, errors: as `profiler.measure`."""
    facts, room = machine_facts(accelerator), reach(accelerator, config)
    found = None if fresh else profile_store.find(setting, facts)
    if found is not None:
        # Free memory comes and goes: only much more room is worth another measurement.
        if found.reach and 4 * sum(found.reach) >= sum(room):
            return found
        LOG.info("the profile of %s reaches to %s tokens of KV on the device, there is room for %s: measured anew",
                 setting.device, found.reach or "unknown", room)
    new = measure(accelerator, host, config, seconds=seconds, progress=progress)
    profile = Profile(setting, facts, new.curves, round(new.seconds, 2), new.notes,
                      datetime.now(timezone.utc).isoformat(timespec="seconds"), room)
    return stored(profile)


def setting_of(path: Path, provider: Provider, kv: str, device_threads: int, host_threads: int,
               options: OffloadOptions, precision: str = "float32") -> Setting:
    """As a model is opened with."""
    from edge_runtime.loading import fingerprint

    return Setting(fingerprint(path), f"onnx:{provider.name}", precision, kv, device_threads, host_threads,
                   options.device_cores, options.host_cores)


def open_and_profile(model: str | os.PathLike[str] | None, device: str, *, kv: str = "int8", precision: str = "float32",
                     threads: int | None = None, options: OffloadOptions | None = None, fresh: bool = False,
                     seconds: float = SECONDS, compiling: Progress | None = None, progress: Progress | None = None,
                     ) -> tuple[Profile, bool]:
    """The profile of a model that is opened for it alone, if it must be measured, and whether it was measured now.
    Arguments as of `LLM`. Raises what opening the model raises, and what `measure` does."""
    from edge_runtime.devices.onnx import OnnxAccelerator, provider_of
    from edge_runtime.devices.onnx.providers import register
    from edge_runtime.hybrid_model import threads_of
    from edge_runtime.loading import resolve

    provider = provider_of(device)
    if provider is None:
        raise InvalidRequestError("device", device, "an ONNX device, such as onnx:cpu or webgpu")
    if kv not in KV_DTYPES:
        raise InvalidRequestError("kv", kv, " or ".join(KV_DTYPES))
    if not seconds >= LEAST_SECONDS:
        raise InvalidRequestError("seconds", seconds, f"{LEAST_SECONDS} or more")
    register(provider)
    path, options = resolve(model), options or OffloadOptions()
    device_threads, host_threads = threads_of(provider, threads, options.host_threads)
    with GGUFFile(path) as file:
        config = config_from_gguf(file)
        setting = setting_of(path, provider, kv, device_threads, host_threads, options, precision)
        token = config.layers * 2 * config.kv_width * 4
        pool = min(token * MOST_TOKENS * 5 // 4, max(_free(file, config, provider), token * 1024))
        accelerator = OnnxAccelerator(
            file, config, provider.name, kv_budget_bytes=pool, threads=device_threads, cores=options.device_cores,
            precision=precision, half_kv=kv == "fp16")
        host = None
        try:
            began = datetime.now(timezone.utc).isoformat(timespec="seconds")
            layout = KVLayout(config.layers, config.kv_heads, config.head_size, kv)
            host = HostAttention(config, layout, threads=host_threads, cores=options.host_cores, progress=compiling)
            found = profile_of(accelerator, host, config, setting, fresh=fresh, seconds=seconds, progress=progress)
            return found, found.date >= began
        finally:
            if host is not None:
                host.close()
            accelerator.close()


def _free(file: GGUFFile, config: ModelConfig, provider: Provider) -> int:
    """Bytes for KV on a device that has nothing to do but to be measured."""
    from edge_runtime.onnx_model import needs_of

    found = capacity(provider)
    if found.shared or found.total is None:
        return memory()[1] // MEMORY_SHARE
    needs = needs_of(file, config, provider)
    return (found.total if found.free is None else found.free) * 3 // 4 - needs.weights - needs.working


def stored(profile: Profile) -> Profile:
    """Itself; a warning where it could not be stored."""
    try:
        profile_store.save(profile)
    except OSError as error:
        warnings.warn(f"the profile is not stored: {error.filename or profile_store.folder()}: "
                      f"{error.strerror or error}", stacklevel=2)
    return profile
