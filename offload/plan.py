"""What a model will need of this machine's memory, computed from file metadata before anything is loaded."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge_runtime.devices.base import KV_DTYPES, PAGE_TOKENS, KVLayout
from edge_runtime.errors import InvalidRequestError, OutOfMemoryError
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.pages import pages_for

GIB, MIB = 1 << 30, 1 << 20
RUNTIME_BYTES = 220 * MIB  # Python, NumPy, Numba and compiled kernels resident, measured 150-200 MiB on x86-64
MIN_CONTEXT = 256  # "auto" opens no model with less: a question and a short answer
KV_SHARE = 4  # of all memory: finished requests leave their KV as cached prefixes, which must not fill the machine


@dataclass(frozen=True)
class DevicePlan:
    """What of a model lies in an accelerator's memory, in bytes and tokens.

    hybrid: the host's memory is the home of all KV, and the device holds copies of what it attends over itself; else
    all KV is the device's. shared: the device's memory is the host's, and both are counted in one budget.
    memory_bytes: what may be used of it; total_bytes: what it has, None where it does not tell. weights_bytes,
    working_bytes: of a step. kv_pool_bytes: what KV may take of it, kv_pool_tokens: tokens that it holds;
    kv_least_bytes: less is of no use. sequences: whole ones, of the plan's context, in the pool; split_tokens: where
    not even one is whole, leading tokens of it that the device attends over, while the host attends over the rest.
    reason: of the choice.
    """

    hybrid: bool
    shared: bool
    memory_bytes: int
    total_bytes: int | None
    weights_bytes: int
    working_bytes: int
    kv_pool_bytes: int
    kv_pool_tokens: int
    kv_least_bytes: int
    sequences: int
    split_tokens: int = 0
    reason: str = ""

    @property
    def needed_bytes(self) -> int:
        """Of the device's memory: weights, working memory and the least KV."""
        return self.weights_bytes + self.working_bytes + self.kv_least_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory_bytes and self.kv_least_bytes <= self.kv_pool_bytes

    @property
    def left_bytes(self) -> int:
        return self.memory_bytes - self.weights_bytes - self.working_bytes - max(self.kv_pool_bytes, 0)


@dataclass(frozen=True)
class Plan:
    """What a model needs of this machine's memory, in bytes and tokens; `print` shows it as a table.

    weights_bytes: as the device holds them; working_bytes: activations, logits, runtime; kv: "int8" or "fp16", "fp32"
    where all KV is an ONNX device's; kv_page_bytes: KV of 64 tokens. context: tokens of one sequence; model_context:
    what the model was made for; max_context: what one sequence could have in the budget; max_batch: sequences that run
    at once. kv_budget_bytes: what all sequences and cached prefixes may fill, page by page; available_bytes: free
    memory now (or the container's); budget_bytes: what this plan may use of it. on_device: what lies in the memory of
    an accelerator, None on devices that have none of their own.
    """

    model: str
    architecture: str
    device: str
    weights_bytes: int
    kv: str
    kv_page_bytes: int
    working_bytes: int
    context: int
    model_context: int
    max_context: int
    max_batch: int
    kv_budget_bytes: int
    available_bytes: int
    budget_bytes: int
    on_device: DevicePlan | None = None

    @property
    def hybrid(self) -> bool:
        """Whether the host holds the KV of an accelerator's model and attends over a part of it."""
        return self.on_device is not None and self.on_device.hybrid

    @property
    def placement(self) -> str:
        """What lives where, in words."""
        there = self.on_device
        if there is None:
            return f"weights and KV in this machine's memory, for {self.device}"
        if not there.hybrid:
            return f"device-only: weights and KV in the memory of {self.device}"
        words = f"hybrid: weights in the memory of {self.device}, KV in the host's; the device attends over copies of "
        if there.split_tokens:
            return words + f"up to {there.split_tokens:,} tokens of a sequence, the host over the rest"
        return words + f"{there.sequences} of up to {self.max_batch} full sequences, the host over the others"

    @property
    def kv_bytes_per_1k_tokens(self) -> int:
        """KV of 1,000 tokens of one sequence."""
        return self.kv_page_bytes * 1000 // PAGE_TOKENS

    @property
    def context_bytes(self) -> int:
        """KV of one sequence that fills the context."""
        return pages_for(self.context) * self.kv_page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV budget holds, of all sequences together."""
        return self.kv_budget_bytes // self.kv_page_bytes * PAGE_TOKENS

    @property
    def base_bytes(self) -> int:
        """Of this machine's memory, whatever the KV: weights and working memory, and the device's pool where its memory
        is the host's too."""
        there = self.on_device
        if there is None:
            return self.weights_bytes + self.working_bytes
        if not there.shared:
            return self.working_bytes
        return self.working_bytes + there.weights_bytes + there.working_bytes + there.hybrid * there.kv_pool_bytes

    @property
    def needed_bytes(self) -> int:
        """Of this machine's memory: weights, working memory and one full context, as far as they lie there."""
        return self.base_bytes + self._kv_here * self.context_bytes

    @property
    def left_bytes(self) -> int:
        """Of the memory available now, after weights, working memory and a full KV budget; negative: missing."""
        return self.available_bytes - self.base_bytes - self._kv_here * max(self.kv_budget_bytes, self.context_bytes)

    @property
    def fits(self) -> bool:
        """Whether weights, working memory and one full context are within the budgets."""
        there = self.on_device
        return self.needed_bytes <= self.budget_bytes and self.context >= 1 and (there is None or there.fits)

    @property
    def _kv_here(self) -> bool:
        there = self.on_device
        return there is None or there.shared or there.hybrid

    def rows(self) -> list[tuple[str, str]]:
        """The table as (what, value)."""
        return [
            ("model", f"{self.model} ({self.architecture})"),
            ("device", self.device),
            *self._device_rows(),
            ("weights", _size(self.weights_bytes)),
            ("KV per 1k tokens", f"{_size(self.kv_bytes_per_1k_tokens)} ({self.kv})"),
            ("working memory", _size(self.working_bytes)),
            ("context", f"{self.context:,} tokens ({_size(self.context_bytes)}); the model allows "
                        f"{self.model_context:,}"),
            ("largest context that fits", f"{self.max_context:,} tokens"),
            ("KV budget", f"{_size(self.kv_budget_bytes)}, {self.kv_tokens:,} tokens in up to {self.max_batch} "
                          f"sequences, taken page by page"),
            ("needed at least", _size(self.needed_bytes)),
            ("memory budget", f"{_size(self.budget_bytes)} of {_size(self.available_bytes)} available"),
            ("left" if self.left_bytes >= 0 else "missing", _size(abs(self.left_bytes))),
        ]

    def _device_rows(self) -> list[tuple[str, str]]:
        there = self.on_device
        if there is None:
            return []
        of = "the host's memory" if there.shared else (
            f"{_size(there.total_bytes)} that it has" if there.total_bytes is not None else "its memory, which it does "
                                                                                            "not tell")
        fill = f"KV pool {_size(max(0, there.kv_pool_bytes))}, {there.kv_pool_tokens:,} tokens"
        whole = f"{there.sequences} whole sequence{'s' * (there.sequences != 1)}" if not there.split_tokens else (
            f"the first {there.split_tokens:,} tokens of one")
        return [
            ("placement", self.placement),
            ("why", there.reason),
            ("device memory", f"{_size(there.memory_bytes)} of {of}"),
            ("on the device", f"weights {_size(there.weights_bytes)}, working memory {_size(there.working_bytes)}, "
                              f"{fill}: {whole}"),
        ]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def check(self) -> Plan:
        """Itself, or `OutOfMemoryError` that shows the plan and what would fit."""
        if self.fits:
            return self
        if self.on_device is not None and not self.on_device.fits and (
                not self.on_device.shared or self.needed_bytes <= self.budget_bytes):
            raise self._device_short(self.on_device)
        if self._kv_here and self.max_context >= min(MIN_CONTEXT, self.model_context):
            mend = f"A context of {self.max_context:,} tokens would fit"
            mend += ", kv='int8' would hold about twice that." if self.kv == "fp16" else "."
        else:
            begin = "No context fits: close" if self._kv_here else "Close"
            mend = (f"{begin} other programs, raise memory_budget to {_size(self._least_budget)} or more, or take a "
                    f"smaller or more strongly quantized model (weights up to "
                    f"{_size(max(0, self.budget_bytes - self.working_bytes - 4 * self.kv_page_bytes))}).")
        raise OutOfMemoryError(f"{self.model} needs {_size(self.needed_bytes)} for weights, working memory and "
                               f"{self.context:,} tokens of context, the budget is {_size(self.budget_bytes)}. {mend}",
                               self)

    @property
    def _least_budget(self) -> int:
        """In which the context that is asked for fits, rounded up so that it still does as it is printed."""
        there, least = self.on_device, self._kv_here * self.context_bytes
        if there is not None and there.shared:
            least = max(least, there.kv_least_bytes) * (2 if there.hybrid else 1)  # of hybrid ones each side has half
        return self.base_bytes + least + (GIB // 100 if self.base_bytes + least >= GIB else MIB // 10)

    def _device_short(self, there: DevicePlan) -> OutOfMemoryError:
        room = there.memory_bytes - there.weights_bytes - there.working_bytes
        if not there.hybrid and room > 0:
            mend = "Take a shorter context, or offload=\"on\": the KV then lives in the host's memory."
        else:
            mend = (f"Give it device_memory of {_size(there.needed_bytes)} or more, take a model with weights up to "
                    f"{_size(max(0, there.weights_bytes + room - there.kv_least_bytes))}, or device=\"cpu\".")
        return OutOfMemoryError(
            f"{self.model} needs {_size(there.needed_bytes)} of the memory of {self.device}: weights "
            f"{_size(there.weights_bytes)}, working memory {_size(there.working_bytes)}, KV "
            f"{_size(there.kv_least_bytes)}; it has {_size(there.memory_bytes)} for that. {mend}", self)


def make_plan(config: ModelConfig, *, weights_bytes: int, activation_bytes: int, kv: str = "auto",
              context: int | str = "auto", max_batch: int = 32, memory_budget: int | None = None,
              device: str = "cpu") -> Plan:
    """The plan, whether it fits or not (`Plan.check`). weights_bytes, activation_bytes: what the device will hold of
    weights and of a step. memory_budget: bytes for weights, KV and working memory together; None: what is available
    now, less a reserve for the rest of the system.

    Raises `InvalidRequestError` for values that no machine could meet.
    """
    if kv not in ("auto", *KV_DTYPES):
        raise InvalidRequestError("kv", kv, f"auto, {' or '.join(KV_DTYPES)}")
    if context != "auto":
        _positive("context", context, "a whole number of tokens from 1 up, or auto")
        if int(context) > config.context_length:
            raise InvalidRequestError("context", context, f"at most {config.context_length}, what the model was made "
                                                          f"for")
    _positive("max_batch", max_batch, "a whole number from 1 up")
    if memory_budget is not None:
        _positive("memory_budget", memory_budget, "a whole number of bytes from 1 up, or None")
    kv = "int8" if kv == "auto" else kv
    page = KVLayout(config.layers, config.kv_heads, config.head_size, kv).page_bytes
    total, available = memory()
    budget = memory_budget if memory_budget is not None else available - max(total // 20, 256 * MIB)
    working = RUNTIME_BYTES + activation_bytes + 2 * max_batch * config.vocab_size * 4  # logits, and sampling them
    left = budget - weights_bytes - working
    max_context = max(0, left // page) * PAGE_TOKENS
    if context == "auto":
        context = min(config.context_length, max(max_context, MIN_CONTEXT))
    context = int(context)
    context_bytes = pages_for(context) * page
    return Plan(
        model=config.name, architecture=config.architecture, device=device, weights_bytes=weights_bytes, kv=kv,
        kv_page_bytes=page, working_bytes=working, context=context, model_context=config.context_length,
        max_context=min(max_context, config.context_length), max_batch=max_batch,
        kv_budget_bytes=max(0, min(left, max(context_bytes, total // KV_SHARE))), available_bytes=available,
        budget_bytes=budget)


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes of memory in all, and available without swapping: the machine's, or the container's where it has less."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used, stat in (("memory.max", "memory.current", "memory.stat"),
                              ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")):
        try:
            most = int((cgroup / limit).read_text())
            held = int((cgroup / used).read_text())
            held -= _reclaimable((cgroup / stat).read_text())
        except (OSError, ValueError):  # no such version of cgroups, or "max"
            continue
        if most < total:
            total, available = most, min(available, max(0, most - held))
    return total, available


def _reclaimable(stat: str) -> int:
    """Page cache that the container would give up before it runs out."""
    values: Mapping[str, str] = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    return sum(int(values.get(name, 0)) for name in ("inactive_file", "active_file"))


def _positive(name: str, value: Any, limit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(name, value, limit)


def _size(count: int) -> str:
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"
