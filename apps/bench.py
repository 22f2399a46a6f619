"""Tokens per second of a model, ours and llama.cpp's in turns, and how much of the machine that is."""
from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.apps.bench_client import Peers, Worker, open_peers
from edge_runtime.devices.base import KV_DTYPES, KVLayout
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.config import ModelConfig, config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.names import EMBEDDING, HEAD, layer_names

BATCH_DEPTH = 256  # prompt of each sequence before a batch decodes
BATCH_TOKENS = 16
LOWER_IS_BETTER = ("load", "first_token", "peak_rss")


@dataclass(frozen=True)
class BenchPlan:
    """prefill: prompt lengths; decode: tokens of a decoding run; depth: KV lengths; batch: numbers of sequences;
    repeat: runs of each row, of which the median counts; threads: None for all physical cores; peer: measure
    llama.cpp too."""

    prefill: tuple[int, ...] = (512,)
    decode: int = 64
    depth: tuple[int, ...] = (0,)
    batch: tuple[int, ...] = ()
    repeat: int = 3
    threads: int | None = None
    kv: str = "int8"
    peer: bool = False
    batch_depth: int = BATCH_DEPTH
    batch_tokens: int = BATCH_TOKENS

    def check(self, config: ModelConfig) -> None:
        """Raises InvalidRequestError for values that this model cannot serve."""
        for name, value in (("decode", self.decode), ("repeat", self.repeat)):
            if value < 1:
                raise InvalidRequestError(name, value, "1 or more")
        if self.threads is not None and self.threads < 1:
            raise InvalidRequestError("threads", self.threads, "1 or more")
        if self.kv not in KV_DTYPES:
            raise InvalidRequestError("kv", self.kv, " or ".join(KV_DTYPES))
        if not (self.prefill or self.depth or self.batch):
            raise InvalidRequestError("prefill", self.prefill, "given, or a depth or a batch")
        if self.tokens > config.context_length:
            raise InvalidRequestError("prefill or depth", self.tokens, f"within the model's context of "
                                                                       f"{config.context_length} tokens")

    @property
    def tokens(self) -> int:
        """The longest sequence of the measurement."""
        return max([*self.prefill, *(d + self.decode for d in self.depth),
                    *([self.batch_depth + self.batch_tokens] if self.batch else [])])


@dataclass(frozen=True)
class Work:
    """What a token costs. layer_weights, head_weights: numbers; weight_bytes: as the file stores them; kv_bytes: per
    token; attention: products and sums per token and token of KV."""

    layer_weights: int
    head_weights: int
    weight_bytes: int
    kv_bytes: int
    attention: int

    @classmethod
    def of(cls, file: GGUFFile, config: ModelConfig, kv: str) -> Work:
        names = [name for layer in map(layer_names, range(config.layers))
                 for name in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)]
        head = file.tensors[EMBEDDING if config.tied_head else HEAD]
        layout = KVLayout(config.layers, config.kv_heads, config.head_size, kv)
        return cls(sum(file.tensors[n].size for n in names), head.size,
                   sum(file.tensors[n].nbytes for n in names) + head.nbytes, layout.bytes_per_token,
                   4 * config.heads * config.head_size * config.layers)

    def prefill_operations(self, tokens: int) -> int:
        """Products and sums of a prompt, logits of its last token included."""
        return 2 * self.layer_weights * tokens + 2 * self.head_weights + self.attention * tokens * tokens // 2

    def step_bytes(self, sequences: int, depth: int) -> int:
        """Read by a step that decodes one token of each sequence."""
        return self.weight_bytes + sequences * depth * self.kv_bytes


def run_bench(path: Path, plan: BenchPlan, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Rows {"name", "value", "llama_cpp", "ratio", "unit", ...}. Rates in tokens/s; load and first_token in seconds and
    peak_rss in MB, where a ratio below 1 is better. llama_cpp and ratio are None where it was not measured; "detail"
    says why, where it was asked for."""
    from edge_runtime.kernels.team import default_threads

    with GGUFFile(path) as file:
        config = config_from_gguf(file)
        plan.check(config)
        work = Work.of(file, config, plan.kv)
    threads = plan.threads or default_threads()
    machine = _machine(threads, say)
    ours = Worker("ours", label="ours")
    peers = Peers()
    try:
        say("loading ours (the first time compiles kernels)")
        loaded = ours.call("load", path=str(path), threads=threads, tokens=plan.tokens, kv=plan.kv)
        if plan.peer:
            say("probing llama.cpp")
            peers = open_peers(path, threads, plan.tokens, say=say)
        return _Measurement(plan, work, machine, ours, loaded, peers, say).rows()
    finally:
        ours.close()
        peers.close()


def _machine(threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Bytes per second and operations per second that the machine reaches at best."""
    from edge_runtime.kernels.bandwidth import measure_bandwidth
    from edge_runtime.kernels.peak import measure_peak

    say("measuring memory bandwidth and arithmetic peak")
    peaks = measure_peak(threads)
    name = "bf16 tiles" if "bf16 tiles" in peaks else "int8"
    return {"bandwidth": measure_bandwidth(threads), "peak_name": name, "peak": peaks[name]}


class _Measurement:
    def __init__(self, plan: BenchPlan, work: Work, machine: dict[str, Any], ours: Worker, loaded: dict[str, Any],
                 peers: Peers, say: Callable[[str], None]):
        self.plan, self.work, self.machine = plan, work, machine
        self.ours, self.loaded, self.peers, self.say = ours, loaded, peers, say

    def rows(self) -> list[dict[str, Any]]:
        plan, found = self.plan, []
        for tokens in plan.prefill:
            row = self._row(f"prefill_{tokens}", "prefill", tokens=tokens)
            share = self.work.prefill_operations(tokens) * row["value"] / tokens / self.machine["peak"]
            found.append({**row, "share_of_peak": round(share, 3), "peak": self._peak()})
        for depth in plan.depth:
            row = self._row(f"decode_at_{depth}", "decode", depth=depth, tokens=plan.decode)
            found.append({**row, **self._share(row["value"], 1, depth + plan.decode // 2)})
        for sequences in plan.batch:
            row = self._row(f"batch_{sequences}", "batch", sequences=sequences, depth=plan.batch_depth,
                            tokens=plan.batch_tokens)
            found.append({**row, **self._share(row["value"], sequences, plan.batch_depth + plan.batch_tokens // 2)})
        return found + self._whole(found)

    def _row(self, name: str, kind: str, **arguments: Any) -> dict[str, Any]:
        """Runs in turns: ours, theirs, theirs, ours, ..."""
        peer = self.peers.worker(kind)
        ours: list[float] = []
        theirs: list[float] = []
        # The first call brings what the row needs into memory: KV up to its depth, pages never touched before.
        warm = {**arguments, "tokens": min(arguments["tokens"], 64 if kind == "prefill" else 2)}
        for warmed in filter(None, (self.ours, peer)):
            warmed.call(kind, **warm)
        for turn in range(self.plan.repeat):
            for worker in ((self.ours, peer), (peer, self.ours))[turn % 2]:
                if worker is not None:
                    (ours if worker is self.ours else theirs).append(worker.call(kind, **arguments))
        row = comparison(name, statistics.median(ours), statistics.median(theirs) if theirs else None, "tokens/s")
        row["runs"] = [round(rate, 2) for rate in ours]
        if theirs:
            row["llama_cpp_runs"] = [round(rate, 2) for rate in theirs]
            row["detail"] = peer.label if peer else ""
        elif self.plan.peer:
            row["detail"] = "; ".join(self.peers.notes) or "llama.cpp did not run"
        self.say(format_row(row))
        return row

    def _share(self, rate: float, sequences: int, depth: int) -> dict[str, Any]:
        used = rate / sequences * self.work.step_bytes(sequences, depth)
        return {"share_of_bandwidth": round(used / self.machine["bandwidth"], 3),
                "bandwidth_gb_s": round(self.machine["bandwidth"] / 1e9, 1)}

    def _peak(self) -> str:
        return f"{self.machine['peak_name']}, {self.machine['peak'] / 1e12:.2f} TOPS measured"

    def _whole(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Loading, first token and memory of the whole processes."""
        build = self.peers.best.get("prefill")
        theirs = self.peers.loads[build]["seconds"] if build else None
        found = [comparison("load", self.loaded["seconds"], theirs, "s", 3)]
        if self.plan.prefill:
            first, tokens = rows[0], self.plan.prefill[0]
            peer = theirs + tokens / first["llama_cpp"] if theirs is not None and first["llama_cpp"] else None
            row = comparison("first_token", self.loaded["seconds"] + tokens / first["value"], peer, "s", 3)
            found.append({**row, "detail": f"loading, and a prompt of {tokens} tokens"})
        worker = self.peers.worker("prefill")
        memory = worker.call("peak_memory") / 1e6 if worker else None
        found.append(comparison("peak_rss", self.ours.call("peak_memory") / 1e6, memory, "MB", 1))
        for row in found:
            self.say(format_row(row))
        return found


def comparison(name: str, ours: float, theirs: float | None, unit: str, digits: int = 2) -> dict[str, Any]:
    """A row; ratio is ours over theirs."""
    return {"name": name, "value": round(ours, digits), "llama_cpp": None if theirs is None else round(theirs, digits),
            "ratio": round(ours / theirs, 3) if theirs else None, "unit": unit}


def format_row(row: dict[str, Any]) -> str:
    text = f"{row['name']:<16} {row['value']:>10,.2f} {row['unit']}"
    if row["llama_cpp"] is not None:
        text += f", llama.cpp {row['llama_cpp']:,.2f}, x {row['ratio']:.2f}"
        if row["name"] in LOWER_IS_BETTER:
            text += " (lower is better)"
    if "share_of_bandwidth" in row:
        text += f", {row['share_of_bandwidth']:.0%} of {row['bandwidth_gb_s']:.1f} GB/s"
    if "share_of_peak" in row:
        text += f", {row['share_of_peak']:.0%} of peak ({row['peak']})"
    return text


def format_rows(rows: list[dict[str, Any]]) -> str:
    details = dict.fromkeys(row["detail"] for row in rows if row.get("detail"))
    return "\n".join([*map(format_row, rows), *details])
