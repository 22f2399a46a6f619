"""How a model is laid out over an accelerator's memory and the host's: who holds the KV, in which type, how much of it
the device attends over. Numbers in, a `Plan` out; nothing is loaded."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.devices.accelerator import DeviceCapacity
from edge_runtime.devices.base import KV_DTYPES, PAGE_TOKENS, KVLayout
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.config import ModelConfig
from edge_runtime.offload.pages import pages_for
from edge_runtime.offload.plan import KV_SHARE, MIB, MIN_CONTEXT, RUNTIME_BYTES, DevicePlan, Plan, _positive, memory

OFFLOAD = ("auto", "on", "off")
MOST_THREADS = 1024  # of a team, see kernels.team
MOST_MS = 1e9
DEVICE_CONTEXT = 4096  # where all KV is float32 on the device, "auto" opens no longer context
RESERVE_SHARE, RESERVE_BYTES = 20, 256 * MIB  # of either memory: left to the rest of the system
GROWTH = 3, 2  # a sequence that grows holds its old place and its new one for a moment
POOL_SHARE = 2  # of memory that host and device share, unless device_memory says: the host's KV is all of it


@dataclass(frozen=True)
class OffloadOptions:
    """Who holds KV and attends, as `LLM` takes it. offload: "on" (the host holds all KV and attends over what the
    device has no room for), "off" (all on the device) or "auto". device_memory: bytes of the device's memory that may
    be used, None: what it has free. tbt_ms: longest milliseconds between two tokens of an interactive request while
    work in bulk runs beside it. host_threads: of the host's attention; host_cores, device_cores: processors that the
    host's attention and the device's own threads stay on, all where empty."""

    offload: str = "auto"
    device_memory: int | None = None
    tbt_ms: float | None = None
    host_threads: int | None = None
    host_cores: tuple[int, ...] = ()
    device_cores: tuple[int, ...] = ()

    def check(self) -> OffloadOptions:
        """Itself. InvalidRequestError: a value that no device could take, or two that exclude each other."""
        if self.offload not in OFFLOAD:
            raise InvalidRequestError("offload", self.offload, ", ".join(OFFLOAD[:-1]) + f" or {OFFLOAD[-1]}")
        if self.device_memory is not None:
            _positive("device_memory", self.device_memory, "a whole number of bytes from 1 up, or None")
        if self.host_threads is not None:
            check_threads("host_threads", self.host_threads)
        if self.tbt_ms is not None:
            number = isinstance(self.tbt_ms, int | float) and not isinstance(self.tbt_ms, bool)
            if not (number and 0 < self.tbt_ms < MOST_MS):
                raise InvalidRequestError("tbt_ms", self.tbt_ms, f"milliseconds, above 0 and below {MOST_MS:.0e}, or "
                                                                 f"None")
            if self.offload == "off":
                raise InvalidRequestError("tbt_ms", self.tbt_ms, 'None with offload="off": the scheduler that keeps it '
                                                                 'is that of offload="on"')
        for name in ("host_cores", "device_cores"):
            cores = getattr(self, name)
            if not isinstance(cores, tuple) or any(type(core) is not int or core < 0 for core in cores):
                raise InvalidRequestError(name, cores, "numbers of processors, from 0 up")
            strange = sorted(set(cores) - _processors())
            if strange:
                raise InvalidRequestError(name, cores, f"processors of this machine: it has no {strange[0]}")
        return self

    def refuse(self, device: str) -> None:
        """For a device that has no memory of its own to offload from. InvalidRequestError."""
        for name, value in (("offload", self.offload if self.offload == "on" else None), ("tbt_ms", self.tbt_ms)):
            if value is not None:
                raise InvalidRequestError(name, value, f'{"auto or off" if name == "offload" else "None"} with '
                                                       f'device="{device}", where all KV is the host\'s: name an '
                                                       f'accelerator, such as device="webgpu"')


@dataclass(frozen=True)
class DeviceNeeds:
    """What a model takes of a device's memory, in bytes. weights; working: activations of a step; token: KV of one
    token; sequence(tokens): KV of one sequence with room for so many tokens, as the device lays it out; lap: of the
    host, for rows on their way between the two."""

    weights: int
    working: int
    token: int
    sequence: Callable[[int], int]
    lap: int = 0

    def leading(self, nbytes: int, context: int) -> int:
        """Tokens that `nbytes` hold of one sequence of `context`, as the device lays it out: all, or whole pages."""
        if self.sequence(context) <= nbytes:
            return context
        low, high = 0, context // PAGE_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.sequence(middle * PAGE_TOKENS) <= nbytes else (low, middle - 1)
        return low * PAGE_TOKENS


def check_threads(name: str, value: int) -> None:
    """InvalidRequestError: not a number of threads."""
    _positive(name, value, "a whole number from 1 up, or None")
    if value > MOST_THREADS:
        raise InvalidRequestError(name, value, f"at most {MOST_THREADS}, or None")


def _processors() -> set[int]:
    """Those that a thread of this process may be told to stay on."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    return {*allowed, *range(os.cpu_count() or 1)}


def plan_device(config: ModelConfig, needs: DeviceNeeds, capacity: DeviceCapacity, *, device: str,
                options: OffloadOptions | None = None, context: int | str = "auto", kv: str = "auto",
                max_batch: int = 32, memory_budget: int | None = None) -> Plan:
    """The plan of a model on an accelerator, whether it fits or not (`Plan.check`). memory_budget: bytes of the host's
    memory; None: what is available now, less a reserve.

    Raises `InvalidRequestError` for values that neither device nor host could meet.
    """
    return _Planner(config, needs, capacity, device, (options or OffloadOptions()).check(), context, kv, max_batch,
                    memory_budget).plan()


class _Planner:
    def __init__(self, config: ModelConfig, needs: DeviceNeeds, capacity: DeviceCapacity, device: str,
                 options: OffloadOptions, context: int | str, kv: str, max_batch: int, memory_budget: int | None):
        self.config, self.needs, self.device, self.options = config, needs, device, options
        self.wanted, self.kv, self.max_batch = context, kv, max_batch
        self._check(memory_budget)
        self.total, self.available = memory()
        reserve = max(self.total // RESERVE_SHARE, RESERVE_BYTES)
        self.budget = memory_budget if memory_budget is not None else self.available - reserve
        self.limited = options.device_memory is not None  # by the caller
        # A device that tells nothing of its memory may as well use the host's, as integrated ones do.
        self.shared = capacity.shared or (capacity.total is None and not self.limited)
        self.capacity = self.total if self.shared else capacity.total
        self.device_budget = self._device_budget(capacity)
        self.working = RUNTIME_BYTES + 2 * max_batch * config.vocab_size * 4  # logits, and sampling them

    def plan(self) -> Plan:
        reason = self._hybrid_because()
        return self._hybrid(reason) if reason else self._device_only()

    def _check(self, memory_budget: int | None) -> None:
        if self.kv not in ("auto", "fp32", *KV_DTYPES):
            raise InvalidRequestError("kv", self.kv, f'auto, fp32, {" or ".join(KV_DTYPES)} with '
                                                     f'device="{self.device}"')
        limit = self.config.context_length
        if self.wanted != "auto":
            _positive("context", self.wanted, "a whole number of tokens from 1 up, or auto")
            if int(self.wanted) > limit:
                raise InvalidRequestError("context", self.wanted, f"at most {limit}, what the model was made for")
        _positive("max_batch", self.max_batch, "a whole number from 1 up")
        if memory_budget is not None:
            _positive("memory_budget", memory_budget, "a whole number of bytes from 1 up, or None")
        if self.kv in KV_DTYPES and self.options.offload == "off":
            raise InvalidRequestError("kv", self.kv, f'auto or fp32 with device="{self.device}" and offload="off"')
        if self.kv == "fp32" and self.options.offload == "on":
            raise InvalidRequestError("kv", self.kv, f'auto, {" or ".join(KV_DTYPES)} with offload="on": the host '
                                                     f"attends over these")

    def _device_budget(self, capacity: DeviceCapacity) -> int:
        asked = self.options.device_memory
        if asked is not None:
            most = self.total if self.shared else capacity.total
            if most is not None and asked > most:
                raise InvalidRequestError("device_memory", asked, f"at most {most}, all that {self.device} has"
                                          + (" (it shares the host's memory)" if self.shared else ""))
            return asked
        if self.shared or capacity.total is None:
            return self.budget
        free = capacity.total if capacity.free is None else capacity.free
        return max(1, free - max(capacity.total // RESERVE_SHARE, RESERVE_BYTES))

    @property
    def _device_left(self) -> int:
        """Of the device's memory, for KV."""
        left = self.device_budget - self.needs.weights - self.needs.working
        if self.shared:
            left = min(left, self.budget - self.needs.weights - self.needs.working - self.working)
        return left

    def _hybrid_because(self) -> str:
        """Why the host is to hold the KV, "" where all of it is the device's."""
        options, left = self.options, self._device_left
        if options.offload == "on":
            return 'offload="on"'
        if options.offload == "off" or self.kv == "fp32":
            return ""
        if options.tbt_ms is not None:
            return f"tbt_ms={options.tbt_ms:g} needs the scheduler that keeps it"
        if self.shared and not self.limited:
            return ""  # what the device has no room for, the host has none for either
        context = self._device_context()
        whole = self.max_batch * self.needs.sequence(context)
        if whole <= left:
            return ""
        return (f"{self.max_batch} sequence{'s' * (self.max_batch > 1)} of {context:,} tokens would take "
                f"{whole / MIB:.1f} MiB of KV on the device, {max(0, left) / MIB:.1f} MiB are left there")

    def _device_context(self) -> int:
        if self.wanted != "auto":
            return int(self.wanted)
        most = self.needs.leading(self._device_left, self.config.context_length)
        return min(self.config.context_length, DEVICE_CONTEXT, max(most, MIN_CONTEXT))

    def _device_only(self) -> Plan:
        if self.kv in KV_DTYPES:
            raise InvalidRequestError("kv", self.kv, f'auto or fp32 with device="{self.device}", where all KV is the '
                                                     f'device\'s; offload="on" keeps it on the host in {self.kv}')
        left, context = self._device_left, self._device_context()
        one = self.needs.sequence(context)
        pool = max(0, min(left, self.max_batch * one * GROWTH[0] // GROWTH[1]))
        reason = "all sequences fit the device"
        if self.shared and not self.limited:  # cached sequences must not fill the machine
            pool = min(pool, max(one, self.total // KV_SHARE))
            reason = "device and host share one memory"
        if self.options.offload == "off":
            reason = 'offload="off"'
        elif self.kv == "fp32":
            reason = "KV in fp32 is the device's alone"
        token = self.config.layers * 2 * self.config.kv_width * 4
        most = self.needs.leading(left, self.config.context_length)
        there = DevicePlan(
            hybrid=False, shared=self.shared, memory_bytes=self.device_budget, total_bytes=self.capacity,
            weights_bytes=self.needs.weights, working_bytes=self.needs.working, kv_pool_bytes=pool,
            kv_pool_tokens=pool // self.needs.token, kv_least_bytes=one,
            sequences=min(self.max_batch, pool // one), reason=reason)
        return self._result(there, "fp32", token * PAGE_TOKENS, context, most, pool)

    def _hybrid(self, reason: str) -> Plan:
        config, needs = self.config, self.needs
        working = self.working + needs.lap
        pages = {kv: KVLayout(config.layers, config.kv_heads, config.head_size, kv).page_bytes for kv in KV_DTYPES}
        left = self._device_left
        smallest = pages[self.kv if self.kv in KV_DTYPES else "int8"]
        if self.shared and not self.limited:
            left = (left - needs.lap) // POOL_SHARE
        elif self.shared:  # at least one context must find room beside the pool, "auto" in up to half of both
            both = self.budget - working - needs.weights - needs.working
            one = smallest * pages_for(MIN_CONTEXT if self.wanted == "auto" else int(self.wanted))
            if self.wanted == "auto":
                one = max(one, min(smallest * pages_for(config.context_length), both // POOL_SHARE))
            left = min(left, both - one)
        longest = config.context_length if self.wanted == "auto" else int(self.wanted)
        pool = max(0, min(left, self.max_batch * needs.sequence(longest)))
        host_left = self.budget - working
        if self.shared:
            host_left -= needs.weights + needs.working + pool
        context = int(self.wanted) if self.wanted != "auto" else min(
            config.context_length, max(MIN_CONTEXT, host_left // smallest * PAGE_TOKENS))
        kv, budget = self._host_kv(pages, context, host_left)
        one = needs.sequence(context)
        split = 0 if one <= pool else needs.leading(pool, context)
        there = DevicePlan(
            hybrid=True, shared=self.shared, memory_bytes=self.device_budget, total_bytes=self.capacity,
            weights_bytes=needs.weights, working_bytes=needs.working, kv_pool_bytes=pool,
            kv_pool_tokens=max(0, pool) // needs.token, kv_least_bytes=needs.sequence(min(MIN_CONTEXT, context)),
            sequences=min(self.max_batch, pool // one), split_tokens=split, reason=reason)
        most = min(max(0, host_left // smallest) * PAGE_TOKENS, config.context_length)
        return self._result(there, kv, pages[kv], context, most, budget, working)

    def _host_kv(self, pages: dict[str, int], context: int, left: int) -> tuple[str, int]:
        """Type of the host's KV, and its budget. Half precision where everybody's full context fits: KV that moves
        between device and host then stays the same, to the last bit; else 8 bits, for twice as many tokens."""
        def budget(kv: str) -> int:
            return max(0, min(left, max(pages_for(context) * pages[kv], self.total // KV_SHARE)))

        if self.kv in KV_DTYPES:
            return self.kv, budget(self.kv)
        fits = self.max_batch * pages_for(context) * pages["fp16"] <= budget("fp16")
        return ("fp16" if fits else "int8"), budget("fp16" if fits else "int8")

    def _result(self, there: DevicePlan, kv: str, page: int, context: int, most: int, kv_budget: int,
                working: int | None = None) -> Plan:
        return Plan(
            model=self.config.name, architecture=self.config.architecture, device=self.device,
            weights_bytes=self.needs.weights, kv=kv, kv_page_bytes=page,
            working_bytes=self.working if working is None else working, context=context,
            model_context=self.config.context_length, max_context=most, max_batch=self.max_batch,
            kv_budget_bytes=kv_budget, available_bytes=self.available, budget_bytes=self.budget, on_device=there)


__all__ = ["OFFLOAD", "DeviceCapacity", "DeviceNeeds", "OffloadOptions", "plan_device"]
