"""Opening a file for hybrid execution: weights on an accelerator, KV on the host, a profile to decide by."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.devices.accelerator import Accelerator
from edge_runtime.devices.base import KVLayout
from edge_runtime.devices.onnx import OnnxAccelerator
from edge_runtime.devices.onnx.providers import PROVIDERS, Provider, hardware
from edge_runtime.kernels.team import default_threads
from edge_runtime.models.config import ModelConfig
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload import profile_store
from edge_runtime.offload.apex import Apex
from edge_runtime.offload.copies import token_bytes
from edge_runtime.offload.cost_model import CostModel, Curves
from edge_runtime.offload.host_attention import HostAttention
from edge_runtime.offload.hybrid_device import HybridDevice
from edge_runtime.offload.plan import Plan
from edge_runtime.offload.planner import OffloadOptions, check_threads
from edge_runtime.profiling import machine_facts, profile_of, setting_of
from edge_runtime.progress import PROFILING
from edge_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edge_runtime.loading import LoadedModel

PROFILE_SECONDS = 20.0  # of measuring at first use; `edge-runtime profile` takes its time
MAX_ROWS = 512
LOG = logging.getLogger("edge_runtime")
Progress = Callable[[str], None]


def load_hybrid(path: Path, file: GGUFFile, config: ModelConfig, tokenizer: Tokenizer, plan: Plan, provider: Provider,
                options: OffloadOptions, *, threads: int | None = None, progress: Progress | None = None,
                curves: Curves | None = None) -> LoadedModel:
    """A model as `plan` lays it out. threads: of the CPU's part, and of a device that is the CPU itself. curves: of
    this machine and model; None: the stored profile, measured now where there is none. Raises as `load_onnx` does, and
    ProfileError."""
    from edge_runtime.loading import LoadedModel, fingerprint, template_of

    there = plan.on_device
    assert there is not None
    device_threads, host_threads = threads_of(provider, threads, options.host_threads)
    spare_threads = threads_of(PROVIDERS["cpu"], threads, options.host_threads)

    def accelerator(name: str, pool: int, threads: int, cores: Sequence[int] = ()) -> OnnxAccelerator:
        return OnnxAccelerator(file, config, name, kv_budget_bytes=pool, context=plan.context, threads=threads,
                               cores=cores, forms=("segments",), max_rows=MAX_ROWS, half_kv=plan.kv == "fp16")

    on_cpu = setting_of(path, PROVIDERS["cpu"], plan.kv, *spare_threads, replace(options, device_cores=()))
    opened = accelerator(provider.name, there.kv_pool_bytes, device_threads, options.device_cores)
    try:
        known = curves or curves_of(path, opened, config, plan, provider, (device_threads, host_threads), options,
                                    progress)

        def after_loss(fresh: Accelerator) -> Apex:
            stored = profile_store.find(on_cpu, machine_facts(fresh))
            return scheduler(fresh, stored.curves if stored else known, plan, options)

        device = HybridDevice(
            opened, config, scheduler(opened, known, plan, options), kv=plan.kv, host_threads=host_threads,
            host_cores=options.host_cores, max_rows=MAX_ROWS,
            reopen=lambda: accelerator("cpu", there.kv_least_bytes, spare_threads[0]), reschedule=after_loss)
    except BaseException:
        opened.close()
        raise
    return LoadedModel(
        device=device, tokenizer=tokenizer, context=plan.context, kv_budget_bytes=plan.kv_budget_bytes,
        max_batch=plan.max_batch, chat_template=template_of(file.metadata, tokenizer), plan=plan, config=config,
        fingerprint=partial(fingerprint, path), close_file=file.close)


def threads_of(provider: Provider, threads: int | None, host_threads: int | None) -> tuple[int, int]:
    """Of the device's sessions and of the host's attention. A device that is the processor itself has half of it. The
    provider is registered. InvalidRequestError: too many."""
    if threads is not None:
        check_threads("threads", threads)
    every = threads or default_threads()
    devices = hardware(provider)
    if provider.name != "cpu" and not (devices and devices[0].device.type.name == "CPU"):
        return every, host_threads or every
    return max(1, every - (host_threads or every // 2)), host_threads or max(1, every // 2)


def scheduler(accelerator: Accelerator, curves: Curves, plan: Plan, options: OffloadOptions) -> Apex:
    """Decides over a pool that hands out places in classes of capacity."""
    kv, token = accelerator.kv, token_bytes(accelerator)
    return Apex(CostModel(curves), size=lambda tokens: -(-kv.bytes_for(min(tokens, plan.context)) // token),
                tbt_seconds=None if options.tbt_ms is None else options.tbt_ms / 1000,
                split=accelerator.capabilities.partial_attention)


def curves_of(path: Path, accelerator: OnnxAccelerator, config: ModelConfig, plan: Plan, provider: Provider,
              threads: tuple[int, int], options: OffloadOptions, progress: Progress | None = None) -> Curves:
    """What device and host take for a layer of this model: as stored, or measured and stored now, which `progress` and
    the log tell."""
    tell, told = progress or (lambda text: None), False

    def measuring(text: str) -> None:
        nonlocal told
        if not told:
            LOG.info("measuring %s on %s for about %.0f s: what is found is stored, and used from now on", config.name,
                     plan.device, PROFILE_SECONDS)
        told = True
        tell(PROFILING + text)

    setting = setting_of(path, provider, plan.kv, *threads, options)
    host = HostAttention(config, KVLayout(config.layers, config.kv_heads, config.head_size, plan.kv),
                         threads=threads[1], cores=options.host_cores, progress=tell)
    try:
        return profile_of(accelerator, host, config, setting, seconds=PROFILE_SECONDS, progress=measuring).curves
    finally:
        host.close()
