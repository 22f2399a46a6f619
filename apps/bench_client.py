"""The measuring side: workers in processes of their own, and the fastest llama.cpp that works here."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.errors import EdgeRuntimeError

PEER_PATH = "EDGE_RUNTIME_PEER_PATH"  # folders with other builds of llama_cpp, tried beside the installed one
KINDS = ("prefill", "decode", "batch")


class WorkerError(EdgeRuntimeError):
    """A runtime under measurement failed or died: says how."""


class Worker:
    """A `bench_worker` process. Its methods are the runner's: `worker.call("prefill", tokens=512)`."""

    def __init__(self, runtime: str, search_path: str | None = None, label: str = ""):
        self.runtime, self.label = runtime, label or runtime
        environment = dict(os.environ)
        if search_path:
            environment["PYTHONPATH"] = os.pathsep.join(
                part for part in (search_path, environment.get("PYTHONPATH")) if part)
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.apps.bench_worker", runtime], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, env=environment, text=True, encoding="utf-8")

    def call(self, do: str, **arguments: Any) -> Any:
        """The runner's answer. Raises WorkerError for what it reports, and where its process is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerError(f"{self.label}: its process ended in {do!r} ({self._ending()})")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.label}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ending(self) -> str:
        code = self._process.wait()
        if code < 0:
            return signal.Signals(-code).name
        self._log.seek(0)
        last = self._log.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {last[-1]}" if last else "")


@dataclass(frozen=True)
class Build:
    """One way to run llama.cpp. search_path: where Python finds the package, None for the installed one;
    extra_buffers: with its repacked weights, faster where they work."""

    search_path: str | None
    extra_buffers: bool = True

    @property
    def label(self) -> str:
        name = "llama.cpp (installed" if self.search_path is None else f"llama.cpp ({Path(self.search_path).name}"
        return name + (")" if self.extra_buffers else ", without repacked weights)")


@dataclass
class Peers:
    """The builds that work, and which is fastest at what. notes: what did not work."""

    best: dict[str, Build] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    workers: dict[Build, Worker] = field(default_factory=dict)
    loads: dict[Build, dict[str, Any]] = field(default_factory=dict)

    def worker(self, kind: str) -> Worker | None:
        return self.workers[self.best[kind]] if kind in self.best else None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def candidate_paths() -> list[str | None]:
    """The installed llama_cpp, and those that EDGE_RUNTIME_PEER_PATH names."""
    return [None, *(part for part in os.environ.get(PEER_PATH, "").split(os.pathsep) if part)]


def open_peers(path: str | os.PathLike[str], threads: int, tokens: int, *, probe_prompt: int = 128,
               probe_decode: int = 8, say: Callable[[str], None] = lambda text: None) -> Peers:
    """Starts llama.cpp in every way there is, drops those that crash, keeps the fastest for each kind of work.

    A build whose repacked weights crash (it happens on processors with AMX) is tried without them.
    """
    peers = Peers()
    rates: dict[Build, dict[str, float]] = {}
    for search_path in candidate_paths():
        for extra in (True, False):
            build = Build(search_path, extra)
            worker = Worker("llama.cpp", search_path, build.label)
            try:
                loaded = worker.call("load", path=str(path), threads=threads, tokens=tokens, extra_buffers=extra)
                worker.call("prefill", tokens=probe_prompt)
                few = max(1, probe_decode // 2)
                rates[build] = {
                    "prefill": max(worker.call("prefill", tokens=probe_prompt) for _ in range(2)),
                    "decode": max(worker.call("decode", depth=0, tokens=probe_decode) for _ in range(2)),
                    "batch": max(worker.call("batch", sequences=4, depth=16, tokens=few) for _ in range(2))}
            except WorkerError as error:
                worker.close()
                peers.notes.append(str(error))
                say(f"{build.label}: does not work here: {error}")
                continue
            peers.workers[build], peers.loads[build] = worker, loaded
            break
    for kind in KINDS if rates else ():
        peers.best[kind] = max((found[kind], i, build) for i, (build, found) in enumerate(rates.items()))[2]
    for build in [b for b in peers.workers if b not in peers.best.values()]:
        peers.workers.pop(build).close()
    if len(rates) > 1:
        say("fastest llama.cpp: " + ", ".join(f"{kind}: {build.label}" for kind, build in peers.best.items()))
    return peers
