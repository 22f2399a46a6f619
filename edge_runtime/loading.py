"""From a file name to what the engine needs: device, tokenizer, chat template, plan."""
from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from edge_runtime.chat_template import ChatTemplate
from edge_runtime.devices.base import Device, KVLayout, Step, StepResult
from edge_runtime.early_exit import check_exit_layers
from edge_runtime.errors import (
    ChatTemplateError,
    EngineStoppedError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from edge_runtime.models.config import ModelConfig, config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.offload.plan import Plan, make_plan
from edge_runtime.offload.planner import OffloadOptions
from edge_runtime.tokenizer import Tokenizer

DEVICES = ("auto", "cpu", "llama.cpp", "onnx:cpu", "webgpu", "cuda", "openvino", "qnn", "coreml", "directml", "vitisai")
MAX_ROWS = 512  # of one step: enough for the wide kernels to run at their peak, and short enough to cancel


@dataclass
class LoadedModel:
    """A model that is ready to run. chat_template: or the error that says why there is none. fingerprint: names the
    weights, for saved sessions; computed when first asked for."""

    device: Device
    tokenizer: Tokenizer
    context: int
    kv_budget_bytes: int
    max_batch: int = 32
    chat_template: ChatTemplate | ChatTemplateError | None = None
    plan: Plan | None = None
    config: ModelConfig | None = None
    fingerprint: Callable[[], str] = field(default=lambda: "")
    close_file: Callable[[], None] = field(default=lambda: None)

    def close(self) -> None:
        """Close device and file, and let go of the device, so that its memory is free even while this object lives."""
        device, self.device = self.device, _ClosedDevice(self.device)
        device.close()
        self.close_file()


class _ClosedDevice:
    """What is left of a device: its sizes."""

    def __init__(self, device: Device):
        self.vocab_size, self.max_rows = device.vocab_size, device.max_rows
        self.kv_layout: KVLayout = device.kv_layout

    def run(self, step: Step) -> StepResult:
        raise EngineStoppedError()

    def close(self) -> None:
        pass


def resolve(model: str | os.PathLike[str] | None) -> Path:
    """The file of a model: a path, or the name of one that was pulled; None is the bundled one."""
    if model is None:
        from edge_runtime.models import bundled

        return Path(bundled.path())
    if not isinstance(model, str | os.PathLike):
        raise InvalidRequestError("model", model, "the path of a GGUF file, the name of a pulled model, or None for "
                                                  "the bundled model")
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise ModelNotFoundError(model, "there is no home folder of that user") from error
    if not os.path.exists(path):  # pathlib's raises where a name is too long
        from edge_runtime.models import hub

        name = path.as_posix()  # on Windows a command's argument has its slashes turned
        if hub.is_name(name):
            return hub.path_of(name)
    if os.path.isfile(path / "config.json"):
        raise UnsupportedModelError(f"a folder of safetensors ({path})", ("GGUF files",), "Make one of it: "
                                    f"edge-runtime quantize {path} {path.name or 'model'}-q4_0.gguf --type Q4_0")
    return path


def plan(model: str | os.PathLike[str] | None, *, device: str = "auto", offload: OffloadOptions | None = None,
         **options: Any) -> Plan:
    """The plan that `load` would follow, with nothing loaded; it may not fit."""
    path, placing = resolve(model), (offload or OffloadOptions()).check()
    if check_device(device) == "llama.cpp":
        from edge_runtime.llama_cpp_model import plan_file as plan_with_llama_cpp

        placing.refuse(device)
        return plan_with_llama_cpp(path, **options)
    if is_onnx(device) or device == "auto":
        from edge_runtime.onnx_model import best_for
        from edge_runtime.onnx_model import plan_file as plan_with_onnx

        chosen = device if is_onnx(device) else best_for(path, options.get("kv", "auto"), placing.offload)
        if chosen is not None:
            return plan_with_onnx(path, chosen, options=placing, **options)
    placing.refuse("cpu")
    with GGUFFile(path) as file:
        return plan_file(file, config_from_gguf(file), **options)


def plan_file(file: GGUFFile, config: ModelConfig, *, threads: int | None = None, max_batch: int = 32,
              **options: Any) -> Plan:
    """The CPU device's plan for an open file; options as in `make_plan`."""
    from edge_runtime.devices.cpu import CpuDevice

    return make_plan(
        config, weights_bytes=CpuDevice.weights_bytes(file, config),
        activation_bytes=CpuDevice.working_bytes(config, MAX_ROWS, threads or os.cpu_count() or 1),
        max_batch=max_batch, device="cpu", **options)


def check_device(device: str) -> str:
    """The device to load on."""
    if device not in DEVICES and not (isinstance(device, str) and device.removeprefix("onnx:") in DEVICES[3:]):
        raise InvalidRequestError("device", device, f"one of {', '.join(DEVICES)}")
    return "cpu" if device == "auto" else device


def is_onnx(device: str) -> bool:
    """Whether ONNX Runtime runs it: "onnx:NAME", or the name of a provider but the CPU's."""
    return device.startswith("onnx:") or device in DEVICES[4:]


def load(model: str | os.PathLike[str] | None, *, device: str = "auto", context: int | str = "auto", kv: str = "auto",
         threads: int | None = None, max_batch: int = 32, memory_budget: int | None = None,
         exit_layers: Sequence[int] | None = None, offload: OffloadOptions | None = None,
         progress: Any = None) -> LoadedModel:
    """Open, plan, check and load. Raises what `LLM` documents."""
    placing = (offload or OffloadOptions()).check()
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidRequestError("threads", threads, "a whole number from 1 up, or None for all cores")
    path = resolve(model)
    if check_device(device) == "llama.cpp":
        from edge_runtime.llama_cpp_model import load_llama_cpp

        if exit_layers is not None:
            raise InvalidRequestError("exit_layers", exit_layers, 'None with device="llama.cpp": it runs all layers')
        placing.refuse(device)
        return load_llama_cpp(path, context=context, threads=threads, max_batch=max_batch,
                              memory_budget=memory_budget)
    if is_onnx(device) or device == "auto":
        from edge_runtime.onnx_model import load_best, load_onnx

        options: dict[str, Any] = dict(context=context, kv=kv, threads=threads, max_batch=max_batch,
                                       memory_budget=memory_budget, options=placing, progress=progress)
        if is_onnx(device):
            if exit_layers is not None:
                raise InvalidRequestError("exit_layers", exit_layers, f'None with device="{device}": it runs all '
                                                                      f'layers')
            return load_onnx(path, device, **options)
        accelerated = load_best(path, **options) if exit_layers is None else None
        if accelerated is not None:
            return accelerated
    placing.refuse("cpu")
    file = GGUFFile(path)
    try:
        config = config_from_gguf(file)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        _warm(tokenizer)
        from edge_runtime.devices.cpu import CpuDevice

        exits = config.exit_layers if exit_layers is None else check_exit_layers(exit_layers, config.layers)
        if not set(exits) <= set(config.exit_layers):
            _warn_untrained(path, exits)
        plan = plan_file(file, config, threads=threads, kv=kv, context=context, max_batch=max_batch,
                         memory_budget=memory_budget).check()
        loaded = CpuDevice.load(file, config, threads=threads, kv=plan.kv, max_rows=MAX_ROWS, exits=exits,
                                progress=progress)
    except BaseException:
        file.close()
        raise
    return LoadedModel(
        device=loaded, tokenizer=tokenizer, context=plan.context, kv_budget_bytes=plan.kv_budget_bytes,
        max_batch=plan.max_batch, chat_template=template_of(file.metadata, tokenizer), plan=plan, config=config,
        fingerprint=partial(fingerprint, path), close_file=file.close)


def _warn_untrained(path: Path, exits: Sequence[int]) -> None:
    """Layers that were not trained as exits may be tried; what that costs is measured, not promised."""
    from edge_runtime import calibration_store

    layers = ",".join(map(str, exits))
    found = [calibration_store.find(name, criterion, missing_kv) for name in (fingerprint(path),)
             for missing_kv in calibration_store.CALIBRATED_MISSING_KV
             for criterion in calibration_store.CALIBRATED_CRITERIA]
    measured = "; ".join(
        f"{one.missing_kv} by {one.criterion}: {one.layers_per_token:.1f} of {one.layers} layers per token, "
        f"{one.measured_tokens:.1%} of the tokens differ" for one in found if one is not None)
    warnings.warn(f"{path.name} was not trained to be left after layers {layers}. " + (
        f"Calibration measured {measured}." if measured else
        f"What that costs was never measured: `edge-runtime calibrate {path.name} --exit-layers {layers}`."),
        stacklevel=4)


def _warm(tokenizer: Tokenizer) -> None:
    """Build what the first encoding needs (0.1-0.3 s) while the device packs its weights without the GIL."""
    def encode() -> None:
        with contextlib.suppress(Exception):  # it comes back when somebody encodes
            tokenizer.encode("a")

    threading.Thread(target=encode, name="edge-runtime-tokenizer", daemon=True).start()


def template_of(metadata: Any, tokenizer: Tokenizer) -> ChatTemplate | ChatTemplateError:
    """The file's chat template, or why there is none: that matters when somebody chats."""
    try:
        return ChatTemplate.from_metadata(metadata, tokenizer)
    except ChatTemplateError as error:
        return error.with_traceback(None)  # whose frames would keep the weights alive


def fingerprint(path: Path) -> str:
    """Names a model file by its metadata, tensor table, size, and the ends of every tensor: milliseconds, where a hash
    of all weights would read gigabytes."""
    digest = blake2b(digest_size=16)
    with GGUFFile(path) as file, open(path, "rb") as raw:
        digest.update(str(file.file_size).encode())
        digest.update(raw.read(file.data_start))
        for tensor in file.tensors.values():
            raw.seek(tensor.offset)
            digest.update(raw.read(min(256, tensor.nbytes)))
            raw.seek(tensor.offset + max(0, tensor.nbytes - 256))
            digest.update(raw.read(min(256, tensor.nbytes)))
    return digest.hexdigest()


def fingerprint_of_file(path: Path) -> str:
    """The same for a file whose tensors are not read here: size, beginning and end."""
    size, sample = path.stat().st_size, 4 << 20
    digest = blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as raw:
        digest.update(raw.read(sample))
        raw.seek(max(0, size - sample))
        digest.update(raw.read(sample))
    return digest.hexdigest()
