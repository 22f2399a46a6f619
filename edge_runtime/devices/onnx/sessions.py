"""A session on one provider: every node placed where asked, or an error; runs with inputs and outputs bound."""
from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.devices.onnx.arrays import DeviceArray, HostArray, Value
from edge_runtime.devices.onnx.providers import Provider, add_to, register, runtime
from edge_runtime.errors import DeviceError, DeviceLostError, EdgeRuntimeError, OutOfMemoryError, PlacementError
from edge_runtime.models.graph.nodes import GraphModel

OUT_OF_MEMORY = ("out of memory", "failed to allocate memory", "bad_alloc", "bad allocation", "outofmemory",
                 "allocation failed")
LOST = ("device lost", "device is lost", "device was lost", "devicelost", "device removed", "cudaerrorecc",
        "unspecified launch failure")
_SHARED_ARENA = threading.Lock()
_arena_made = False


@dataclass(frozen=True)
class SessionSettings:
    """threads: of one run, the calling one counted. cores: processors that these threads are pinned to; the calling
    thread pins itself. hardware: "CPU", "GPU" or "NPU", where a provider has several."""

    provider: Provider
    threads: int = 1
    cores: tuple[int, ...] = ()
    hardware: str | None = None


class Session:
    """One graph on one provider. weights: the values of its initializers, by name, shared between sessions."""

    def __init__(self, model: GraphModel, settings: SessionSettings, weights: Mapping[str, Any],
                 dimensions: Mapping[str, int] | None = None):
        provider = settings.provider
        self.model, self.provider = model, provider
        self._types = {p.name: np.dtype(p.dtype) for p in (*model.inputs, *model.outputs)}
        with failures(provider, f"loading {model.name}"):
            options = _options(settings)
            for name, size in (dimensions or {}).items():
                options.add_free_dimension_override_by_name(name, size)
            self.hardware = add_to(options, provider, settings.hardware)
            values = [weights[name] for name in model.weights]
            if values:
                options.add_external_initializers(list(model.weights), values)
            self._session = runtime().InferenceSession(model.proto, options, enable_fallback=False)
        self._check_placement()

    def _check_placement(self) -> None:
        """Nodes that another provider took: ONNX Runtime would run them there without a word."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return  # onnxruntime before 1.24: `_options` forbids the fallback instead
        for part in self._session.get_provider_graph_assignment_info():
            if part.ep_name.split(".")[0] != self.provider.ep:
                nodes = [node.name for node in part.get_nodes()]
                raise PlacementError(self.model.name, self.provider.ep, nodes, part.ep_name)

    def run(self, inputs: Mapping[str, Value | np.ndarray], outputs: Mapping[str, Value | tuple[int, ...]],
            to_host: Sequence[str] = ()) -> dict[str, Any]:
        """inputs: values on the device, or NumPy arrays of the host. outputs: a value to write into, or the shape of a
        new one. Returns the new ones, as values of the device; as NumPy arrays for names in `to_host`."""
        memory = self.provider.memory
        binding = self._session.io_binding()
        new: dict[str, Any] = {}
        kept = []
        for name, value in inputs.items():
            dtype = self._types[name]
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value, dtype)
                kept.append(value)
                binding.bind_cpu_input(name, value)
            elif isinstance(value, HostArray):
                binding.bind_input(name, "cpu", 0, dtype, value.shape, value.address)
            else:
                binding.bind_input(name, memory, 0, dtype, value.shape, value.address)
        order = []
        for name, wanted in outputs.items():
            dtype = self._types[name]
            order.append(name)
            if isinstance(wanted, DeviceArray):
                binding.bind_output(name, memory, 0, dtype, wanted.shape, wanted.address)
            elif isinstance(wanted, HostArray):
                binding.bind_output(name, "cpu", 0, dtype, wanted.shape, wanted.address)
            elif memory == "cpu" or name in to_host:
                array = np.empty(wanted, dtype)
                new[name] = array if name in to_host else HostArray(array)
                binding.bind_output(name, "cpu", 0, dtype, wanted, array.ctypes.data)
            else:
                new[name] = wanted
                binding.bind_output(name, memory, 0)
        with failures(self.provider, f"running {self.model.name}"):
            self._session.run_with_iobinding(binding)
            if memory != "cpu":
                values = binding.get_outputs()
                for name, value in zip(order, values):
                    if isinstance(new.get(name), tuple):
                        new[name] = DeviceArray(value, new[name])
        return new


@contextmanager
def failures(provider: Provider, doing: str):
    """ONNX Runtime's exceptions as ours."""
    try:
        yield
    except EdgeRuntimeError:
        raise
    except Exception as error:
        text, low = str(error), str(error).lower()
        where = f'device="onnx:{provider.name}" failed while {doing}'
        if "fallback to cpu ep" in low:
            raise PlacementError(doing.split()[-1], provider.ep, ["some nodes"], "CPUExecutionProvider") from error
        if isinstance(error, MemoryError) or any(sign in low for sign in OUT_OF_MEMORY):
            raise OutOfMemoryError(f"{where}: out of memory: {text}. Give the KV a smaller budget.") from error
        if any(sign in low for sign in LOST):
            raise DeviceLostError(f'{where}: the device was lost: {text}. Open the model again, or with device="cpu".'
                                  ) from error
        raise DeviceError(f"{where}: {text}. Try {provider.mend} --upgrade, the device's newest driver, or "
                          f'device="cpu".') from error


def _options(settings: SessionSettings) -> Any:
    ort = runtime()
    register(settings.provider)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info") and settings.provider.name != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if settings.cores:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        others = [str(core + 1) for core in settings.cores[1:settings.threads]]  # counted from 1; the caller not named
        if len(others) == settings.threads - 1 and others:
            options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(others))
    if settings.provider.memory == "cpu":
        _share_arena(ort, options)
    return options


def _share_arena(ort: Any, options: Any) -> None:
    """All sessions take activations from one arena, which would else be one each."""
    global _arena_made
    with _SHARED_ARENA:
        if not _arena_made:
            info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            with suppress(Exception):  # somebody else in this process made one
                ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
            _arena_made = True
    options.add_session_config_entry("session.use_env_allocators", "1")
