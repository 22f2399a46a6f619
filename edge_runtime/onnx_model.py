"""Opening a file on an ONNX device: its plan, and the engine's view of a device that keeps its own KV."""
from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.devices.llama_cpp import HISTORY_LAYOUT
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError
from edge_runtime.models.config import ModelConfig, config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.pages import PAGE_TOKENS, pages_for
from edge_runtime.offload.plan import RUNTIME_BYTES, Plan, memory
from edge_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edge_runtime.loading import LoadedModel

MAX_ROWS = 512
DEFAULT_CONTEXT = 4096  # float32 KV is four times the CPU device's: "auto" opens no longer context
ROWS_BYTES = 16 << 20  # activations of a step, at least
CLASS_WASTE = 3, 2  # capacity classes leave at most a third of a sequence's KV empty
LOG = logging.getLogger("edge_runtime")


def plan_onnx(file: GGUFFile, config: ModelConfig, device: str, *, context: int | str = "auto", kv: str = "auto",
              max_batch: int = 32, memory_budget: int | None = None, threads: int | None = None) -> Plan:
    """What the device will hold. Its memory counts as this machine's, since not every provider tells its own; give
    `memory_budget` where a card has less. KV is float32."""
    from edge_runtime.models.graph.decoder import DecoderGraphs

    if kv not in ("auto", "fp32"):
        raise InvalidRequestError("kv", kv, f'auto or fp32 with device="{device}"')
    if context != "auto" and (isinstance(context, bool) or not isinstance(context, int)
                              or not 1 <= context <= config.context_length):
        raise InvalidRequestError("context", context, f"auto, or from 1 to {config.context_length}, what the model was "
                                                      f"made for")
    for name, value in (("max_batch", max_batch), ("memory_budget", memory_budget)):
        if isinstance(value, bool) or not ((value is None and name == "memory_budget") or (isinstance(value, int)
                                           and value >= 1)):
            raise InvalidRequestError(name, value, "a whole number from 1 up")
    total, available = memory()
    budget = memory_budget if memory_budget is not None else available - max(total // 20, 256 << 20)
    weights = DecoderGraphs(file, config).nbytes
    token = config.layers * 2 * config.kv_width * 4
    widest = max(config.ffn * 3, config.vocab_size // 16, config.width * 4)
    working = RUNTIME_BYTES + max(ROWS_BYTES, MAX_ROWS * widest * 4) + 2 * max_batch * config.vocab_size * 4
    left = budget - weights - working
    most = max(0, left // (token * PAGE_TOKENS)) * PAGE_TOKENS * CLASS_WASTE[1] // CLASS_WASTE[0]
    if context == "auto":
        context = min(config.context_length, DEFAULT_CONTEXT, max(most, 256))
    one = pages_for(int(context)) * PAGE_TOKENS * token * CLASS_WASTE[0] // CLASS_WASTE[1]
    return Plan(
        model=config.name, architecture=config.architecture, device=device, weights_bytes=weights, kv="fp32",
        kv_page_bytes=token * PAGE_TOKENS, working_bytes=working, context=int(context),
        model_context=config.context_length, max_context=min(most, config.context_length), max_batch=max_batch,
        kv_budget_bytes=max(0, min(left, max(one, total // 4), one * max_batch)), available_bytes=available,
        budget_bytes=budget)


def load_onnx(path: Path, device: str, *, context: int | str = "auto", kv: str = "auto", threads: int | None = None,
              max_batch: int = 32, memory_budget: int | None = None) -> LoadedModel:
    """A model on a provider, "onnx:NAME" or a short name. Raises MissingExtraError (the provider is not installed),
    DeviceError (it does not start), PlacementError (it does not take a part of the model), OutOfMemoryError, and what
    `GGUFFile` and `config_from_gguf` raise."""
    from edge_runtime.devices.onnx import OnnxAccelerator, OnnxDevice, provider_of
    from edge_runtime.devices.onnx.providers import register
    from edge_runtime.kernels.team import default_threads
    from edge_runtime.loading import LoadedModel, fingerprint, template_of

    provider = provider_of(device)
    assert provider is not None
    register(provider)
    file = GGUFFile(path)
    try:
        config = config_from_gguf(file)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        plan = plan_onnx(file, config, f"onnx:{provider.name}", context=context, kv=kv, max_batch=max_batch,
                         memory_budget=memory_budget).check()
        form = "whole" if provider.operator_attention else "segments"
        accelerator = OnnxAccelerator(file, config, provider.name, kv_budget_bytes=plan.kv_budget_bytes,
                                      context=plan.context, threads=threads or default_threads(), forms=(form,),
                                      max_rows=MAX_ROWS)
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
    device = best_for(path, options.get("kv", "auto"))
    if device is None:
        return None
    try:
        return load_onnx(path, device, **options)
    except InvalidRequestError:
        raise
    except EdgeRuntimeError as error:
        LOG.warning('device="auto": %s cannot run this model, the CPU does: %s', device, error)
        return None


def best_for(path: Path, kv: str = "auto") -> str | None:
    """The accelerator that device="auto" takes for a file. None: there is none, or the file has exits, which only the
    CPU device computes, or a KV type is asked for that only it has."""
    from edge_runtime.devices.onnx.providers import best

    device = best() if kv in ("auto", "fp32") else None
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
        return plan_onnx(file, config_from_gguf(file), f"onnx:{provider.name}", **options)
