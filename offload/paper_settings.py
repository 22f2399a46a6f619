"""The settings in which APEX (arXiv 2506.03296) and NEO (arXiv 2411.01142) were evaluated, simulated from datasheets
beside what they published. Nothing here is fitted to the published figures; docs/simulator.md explains the gaps."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edge_runtime.offload.hardware import Machine, describe
from edge_runtime.offload.hardware_presets import GB, machine, model
from edge_runtime.offload.simulation_result import SimulationResult
from edge_runtime.offload.simulator import Limits, simulate
from edge_runtime.offload.traces import Request, synthetic

POLICIES = ("gpu-only", "streaming", "neo", "apex-paper", "apex")
BLOCK = 16  # tokens of a block of vLLM's and NEO's KV


@dataclass(frozen=True)
class Setting:
    """pool_tokens: KV that the device had, host_bytes: that the host had, chunk: tokens of an iteration, from the
    configs of NEO's repository (evaluation/configs at b55aaab). published: of which system against which, as its
    authors put it."""

    name: str
    preset: str
    model: str
    pool_tokens: int
    host_bytes: float
    chunk: int
    prompt: int
    output: int
    spread: float
    requests: int
    published: str

    def trace(self) -> list[Request]:
        """All at once: throughput under saturation, as the published figures are at their peak."""
        return synthetic(self.requests, self.prompt, self.output, spread=self.spread)


def _a10(output: int, vcpus: int, published: str) -> Setting:
    # g5.4xlarge and g5.16xlarge; 1650 blocks, 120 GB of host KV, 20,480 tokens an iteration.
    return Setting(f"A10G, {vcpus // 2} cores, Llama-3.1-8B, 1000 + {output}", f"a10-{vcpus}", "llama3.1-8b",
                   1650 * BLOCK, min(120 * GB, 0.75 * 4 * GB * vcpus), 20480, 1000, output, 0.1, 120, published)


# g4dn.4xlarge: 54 blocks (two sequences), 20 GB of host KV, 832 tokens an iteration; the OSC workload's mean lengths.
T4 = Setting("T4, 8 cores, Llama-2-7B, 372 + 45", "t4-16", "llama2-7b", 54 * BLOCK, 20 * GB, 832, 372, 45, 0.5, 120,
             "NEO: up to 7.5 x; APEX: 1.84 to 1.96 x vLLM, up to 1.72 x the best hybrid")
SETTINGS: tuple[Setting, ...] = (
    T4,
    *(_a10(output, 16, "NEO: up to 1.26 x; APEX: 1.11 to 1.89 x vLLM, up to 1.37 x the best hybrid")
      for output in (50, 100, 200, 300, 400)),
    *(_a10(output, 64, "NEO: up to 1.793 x") for output in (50, 100, 200, 300, 400)),
)
STRONG_HOST = SETTINGS[-2]


@dataclass(frozen=True)
class Outcome:
    setting: Setting
    results: dict[str, SimulationResult]

    def ratio(self, policy: str, against: str = "gpu-only") -> float:
        return self.results[policy].throughput / self.results[against].throughput


def run(settings: Sequence[Setting] = SETTINGS, policies: Sequence[str] = POLICIES, *,
        change: Callable[[Machine], Machine] | None = None,
        progress: Callable[[str], None] | None = None) -> Iterator[Outcome]:
    """One setting after another. change: what to assume of the machine instead."""
    for setting in settings:
        hardware, shape = machine(setting.preset), model(setting.model)
        curves = describe(change(hardware) if change else hardware, shape)
        limits = Limits(setting.pool_tokens, int(setting.host_bytes / curves.kv_bytes_host), chunk=setting.chunk,
                        page=BLOCK)
        results = {}
        for policy in policies:
            if progress:
                progress(f"{setting.name}: {policy}")
            results[policy] = simulate(curves, setting.trace(), limits, policy)
        yield Outcome(setting, results)


def sensitivity(setting: Setting = T4, policies: Sequence[str] = ("gpu-only", "neo", "apex"), *,
                progress: Callable[[str], None] | None = None) -> list[tuple[str, Outcome]]:
    """What a setting's ratios owe to single assumptions: each halved or doubled."""
    changes: list[tuple[str, Setting, Callable[[Machine], Machine] | None]] = [("as assumed", setting, None)]
    for factor in (0.5, 2.0):
        changes += [
            (f"host bandwidth x {factor:g}", setting, lambda m, f=factor: replace(  # type: ignore[misc]
                m, host=replace(m.host, bandwidth=m.host.bandwidth * f))),
            (f"device's call time x {factor:g}", setting, lambda m, f=factor: replace(  # type: ignore[misc]
                m, device=replace(m.device, call=m.device.call * f))),
            (f"device's arithmetic x {factor:g}", setting, lambda m, f=factor: replace(  # type: ignore[misc]
                m, device=replace(m.device, flops=m.device.flops * f))),
            (f"device's KV pool x {factor:g}", replace(setting, pool_tokens=int(setting.pool_tokens * factor)), None)]
    return [(name, next(run([changed], policies, change=change, progress=progress)))
            for name, changed, change in changes]
