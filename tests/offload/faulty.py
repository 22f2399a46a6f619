"""An accelerator that fails on command, and a language model on it."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_runtime import LLM
from edge_runtime.devices.onnx import OnnxAccelerator
from edge_runtime.errors import DeviceLostError
from edge_runtime.loading import LoadedModel
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel
from edge_runtime.offload.hybrid_device import HybridDevice
from edge_runtime.tokenizer import Tokenizer

COMPUTE = ("embed", "segment", "attend", "attend_partial", "attend_over", "head", "upload", "download", "take", "join")
KV = ("open", "grow", "write")
GAP = 1e-2  # of the reference's two best logits, below which rounding KV to halves may give another token

Fault = Callable[[str, int, tuple], Exception | None]  # of a call's name, its number counted from 0, its arguments


class Faulty:
    """Passes calls on, and asks `fault` before each. After a DeviceLostError every call raises one."""

    def __init__(self, inner: OnnxAccelerator, spares: list[OnnxAccelerator]):
        self._inner, self._spares, self.lost = inner, spares, False
        self.fault: Fault | None = None
        self.calls: list[str] = []
        self.kv = FaultyKV(inner.kv, self)
        for name in COMPUTE:
            setattr(self, name, self._guarded(name, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fail_at(self, call: int, error: Exception) -> None:
        """Once, at the call that comes after `call` more."""
        number = len(self.calls) + call
        self.fault = lambda name, n, arguments: error if n == number else None

    def close(self) -> None:
        """What was lost serves as the next device, as empty as a new one."""
        if self.lost:
            self._inner.kv.clear()
            self._spares.append(self._inner)
        else:
            self._inner.close()

    def before(self, name: str, arguments: tuple) -> None:
        if self.lost:
            raise DeviceLostError(f"{name} on a device that was lost")
        error = self.fault(name, len(self.calls), arguments) if self.fault is not None else None
        self.calls.append(name)
        if error is not None:
            self.lost = isinstance(error, DeviceLostError)
            raise error

    def _guarded(self, name: str, call: Callable) -> Callable:
        def guarded(*arguments: Any, **options: Any) -> Any:
            self.before(name, arguments)
            return call(*arguments, **options)

        return guarded


class FaultyKV:
    def __init__(self, inner: Any, owner: Faulty):
        self._inner = inner
        for name in KV:
            setattr(self, name, owner._guarded(name, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Hybrid:
    """An LLM on a hybrid device on a faulty accelerator; it checks replies by the reference."""

    def __init__(self, path: Path, apex: Any, *, kv: str = "fp16", device_kv: int = 1 << 20, pages: int = 64,
                 context: int = 512, device_context: int | None = None, max_batch: int = 8, reopens: int = 1 << 30):
        self.file = GGUFFile(path)
        self.config = config_from_gguf(self.file)
        self.kv, self.device_kv, self.device_context = kv, device_kv, device_context
        self.reopens = reopens
        self.spares: list[OnnxAccelerator] = []
        self.device = HybridDevice(self.opened(), self.config, apex, kv=kv, reopen=self._reopen)
        self.llm = LLM.from_loaded(LoadedModel(
            self.device, Tokenizer.from_metadata(self.file.metadata), context, pages * self.device.kv_layout.page_bytes,
            max_batch, config=self.config, close_file=self.file.close))
        self.reference = ReferenceModel.load(self.file)

    @property
    def accelerator(self) -> Faulty:
        found = self.device.accelerator
        assert isinstance(found, Faulty)
        return found

    def opened(self) -> Faulty:
        inner = self.spares.pop() if self.spares else OnnxAccelerator(
            self.file, self.config, kv_budget_bytes=self.device_kv, context=self.device_context,
            half_kv=self.kv == "fp16")
        return Faulty(inner, self.spares)

    def close(self) -> None:
        self.llm.close()
        for spare in self.spares:
            spare.close()

    def _reopen(self) -> Any:
        if not self.reopens:
            raise OSError("no other device is plugged in")
        self.reopens -= 1
        return self.opened()

    def check(self, prompt: list[int], tokens: tuple[int, ...] | list[int], gap: float = GAP) -> None:
        """Greedy tokens are those of the reference, up to the gap."""
        logits = self.reference.forward([*prompt, *tokens])
        for i, token in enumerate(tokens):
            row = logits[len(prompt) + i - 1]
            assert row[token] > row.max() - gap, (i, token, int(row.argmax()))

    def settled(self) -> None:
        """Nothing is left anywhere but cached prefixes."""
        engine = self.llm.engine

        def idle() -> None:
            assert engine.batcher.idle and not engine._requests
            engine.cache.check_integrity([])
            assert len(self.device._cohorts) == 0 and list(self.device._copies) == []
            assert self.device.accelerator.kv.used_bytes == 0

        engine.call(idle)
        assert not engine._open


@contextmanager
def hybrid(path: Path, apex: Any, **options: Any):
    found = Hybrid(path, apex, **options)
    try:
        yield found
    finally:
        found.close()
