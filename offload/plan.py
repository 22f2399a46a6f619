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
class Plan:
    """What a model needs of this machine's memory, in bytes and tokens; `print` shows it as a table.

    weights_bytes: as the device holds them; working_bytes: activations, logits, runtime; kv: "int8" or "fp16";
    kv_page_bytes: KV of 64 tokens. context: tokens of one sequence; model_context: what the model was made for;
    max_context: what one sequence could have in the budget; max_batch: sequences that run at once. kv_budget_bytes:
    what all sequences and cached prefixes may fill, page by page; available_bytes: free memory now (or the
    container's); budget_bytes: what this plan may use of it.
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
    def needed_bytes(self) -> int:
        """Weights, working memory and one full context."""
        return self.weights_bytes + self.working_bytes + self.context_bytes

    @property
    def left_bytes(self) -> int:
        """Of the memory available now, after weights, working memory and a full KV budget; negative: missing."""
        return self.available_bytes - self.weights_bytes - self.working_bytes - max(
            self.kv_budget_bytes, self.context_bytes)

    @property
    def fits(self) -> bool:
        """Whether weights, working memory and one full context are within the budget."""
        return self.needed_bytes <= self.budget_bytes and self.context >= 1

    def rows(self) -> list[tuple[str, str]]:
        """The table as (what, value)."""
        return [
            ("model", f"{self.model} ({self.architecture})"),
            ("device", self.device),
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

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def check(self) -> Plan:
        """Itself, or `OutOfMemoryError` that shows the plan and what would fit."""
        if self.fits:
            return self
        base = self.weights_bytes + self.working_bytes
        if self.max_context >= min(MIN_CONTEXT, self.model_context):
            mend = f"A context of {self.max_context:,} tokens would fit"
            mend += ", kv='int8' would hold about twice that." if self.kv == "fp16" else "."
        else:
            mend = (f"No context fits: close other programs, raise memory_budget to {_size(base + self.kv_page_bytes)} "
                    f"or more, or take a smaller or more strongly quantized model (weights up to "
                    f"{_size(max(0, self.budget_bytes - self.working_bytes - 4 * self.kv_page_bytes))}).")
        raise OutOfMemoryError(f"{self.model} needs {_size(self.needed_bytes)} for weights, working memory and "
                               f"{self.context:,} tokens of context, the budget is {_size(self.budget_bytes)}. {mend}",
                               self)


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
