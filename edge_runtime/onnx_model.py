"""Opening a file on an ONNX device: its plan, and the engine's view of a device that keeps its own KV."""
from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.devices.llama_cpp import HISTORY_LAYOUT
from edge_runtime.devices.onnx.capacity import capacity
from edge_runtime.devices.onnx.kv import SPARE, capacity_class
from edge_runtime.devices.onnx.providers import Provider
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError
from edge_runtime.models.config import ModelConfig, config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.pages import PAGE_TOKENS, pages_for
from edge_runtime.offload.plan import Plan
from edge_runtime.offload.planner import DeviceNeeds, OffloadOptions, check_threads, plan_device
from edge_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edge_runtime.loading import LoadedModel

MAX_ROWS = 512
LONG = 1024  # tokens of a sequence whose bytes are shared out to its tokens
ROWS_BYTES = 16 << 20  # activations of a step, at least
CLASS_WASTE = 3, 2  # capacity classes leave at most a third of a sequence's KV empty
LOG = logging.getLogger("edge_runtime")
Progress = Callable[[str], None]


def plan_onnx(file: GGUFFile, config: ModelConfig, provider: Provider, *, context: int | str = "auto",
              kv: str = "auto", max_batch: int = 32, memory_budget: int | None = None,
              options: OffloadOptions | None = None) -> Plan:
    """What lies where. A device that does not tell its memory counts as using this machine's, unless
    options.device_memory says otherwise."""
    options = (options or OffloadOptions()).check()
    found = capacity(provider)
    return plan_device(config, needs_of(file, config, provider), found, device=f"onnx:{provider.name}",
                       options=options, context=context, kv=kv, max_batch=max_batch, memory_budget=memory_budget)


def needs_of(file: GGUFFile, config: ModelConfig, provider: Provider) -> DeviceNeeds:
    """What the graphs of a file take of a provider's device."""
    from edge_runtime.models.graph.decoder import DecoderGraphs

    token = config.layers * 2 * config.kv_width * 4
    spare = 0 if provider.memory == "cpu" else SPARE  # see devices.onnx.kv
    limit = config.context_length
    sequence = lambda tokens: (capacity_class(tokens, limit) + spare) * token
    widest = max(config.ffn * 3, config.vocab_size // 16, config.width * 4)
    some = min(LONG, limit)
    return DeviceNeeds(
        weights=DecoderGraphs(file, config).nbytes, working=max(ROWS_BYTES, MAX_ROWS * widest * 4),
        token=sequence(some) // some, sequence=sequence,
        lap=config.layers * MAX_ROWS * (config.q_width + 2 * config.kv_width) * 4)


def load_onnx(path: Path, device: str, *, context: int | str = "auto", kv: str = "auto", threads: int | None = None,
              max_batch: int = 32, memory_budget: int | None = None, options: OffloadOptions | None = None,
              progress: Progress | None = None) -> LoadedModel:
    """A model on a provider, "onnx:NAME" or a short name; hybrid where the plan says so. Raises MissingExtraError (the
    provider is not installed), DeviceError (it does not start), PlacementError (it does not take a part of the model),
    OutOfMemoryError, and what `GGUFFile` and `config_from_gguf` raise."""
    from edge_runtime.devices.onnx import OnnxAccelerator, OnnxDevice, provider_of
    from edge_runtime.devices.onnx.providers import register
    from edge_runtime.hybrid_model import load_hybrid
    from edge_runtime.kernels.team import default_threads
    from edge_runtime.loading import LoadedModel, fingerprint, template_of

    if threads is not None:
        check_threads("threads", threads)
    provider = provider_of(device)
    assert provider is not None
    register(provider)
    options = (options or OffloadOptions()).check()
    file = GGUFFile(path)
    try:
        config = config_from_gguf(file)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        plan = plan_onnx(file, config, provider, context=context, kv=kv, max_batch=max_batch,
                         memory_budget=memory_budget, options=options).check()
        if plan.hybrid:
            return load_hybrid(path, file, config, tokenizer, plan, provider, options, threads=threads,
                               progress=progress)
        form = "whole" if provider.operator_attention else "segments"
        accelerator = OnnxAccelerator(file, config, provider.name, kv_budget_bytes=plan.kv_budget_bytes,
                                      context=plan.context, threads=threads or default_threads(), forms=(form,),
                                      cores=options.device_cores, max_rows=MAX_ROWS)
    except BaseException:
        file.close()
        raise
    tokens = plan.kv_budget_bytes // (plan.kv_page_bytes // PAGE_TOKENS) * CLASS_WASTE[1] // CLASS_WASTE[0]
    pages = max(pages_for(tokens), pages_for(plan.context) + 1)
    return LoadedModel(
        device=OnnxDevice(accelerator, form), tokenizer=tokenizer, context=plan.context,
        kv_budget_bytes=pages * HISTORY_LAYOUT.page_bytes, max_batch=plan.max_batch,
        chat_template=template_of(file.metadata, tokenizer), plan=plan, config=config,
        fingerprint=partial(fingerprint, path), close_file=file.close)


def load_best(path: Path, **options: Any) -> LoadedModel | None:
    """The model on the accelerator that this machine has, for device="auto"; None where it has none, or where that
    cannot run the model (which is logged)."""
    offload: OffloadOptions = options.get("options") or OffloadOptions()
    device = best_for(path, options.get("kv", "auto"), offload.offload)
    if device is None:
        return None
    try:
        return load_onnx(path, device, **options)
    except InvalidRequestError:
        raise
    except EdgeRuntimeError as error:
        LOG.warning('device="auto": %s cannot run this model, the CPU does: %s', device, error)
        return None


def best_for(path: Path, kv: str = "auto", offload: str = "auto") -> str | None:
    """The accelerator that device="auto" takes for a file. None: there is none, or the file has exits, which only the
    CPU device computes, or a KV type is asked for that only the host has, without offload="on"."""
    from edge_runtime.devices.onnx.providers import best

    device = best() if kv in ("auto", "fp32") or offload == "on" else None
    if device is not None:
        with GGUFFile(path) as file:
            if config_from_gguf(file).exit_layers:
                return None
    return device


def plan_file(path: Path, device: str, **options: Any) -> Plan:
    """The plan for a file, nothing loaded."""
    from edge_runtime.devices.onnx import provider_of

    provider = provider_of(device)
    assert provider is not None
    with GGUFFile(path) as file:
        return plan_onnx(file, config_from_gguf(file), provider, **options)
