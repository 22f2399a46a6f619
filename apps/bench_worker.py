"""A runtime under measurement, in a process of its own: commands as JSON lines on stdin, answers on stdout.

    python -m edge_runtime.apps.bench_worker ours|llama.cpp

Both runtimes answer the same commands (`Runner`), so that what one does the other does. A process of its own has a
peak memory of its own, and may crash without taking the measurement along.
"""
from __future__ import annotations

import json
import os
import sys
from typing import Any, Protocol

STEP_TOKENS = 512  # of a prompt, computed at once: llama.cpp's default, and ours


class Runner(Protocol):
    """Token ids are random: speed does not depend on them. Rates are tokens per second, times seconds."""

    def load(self, path: str, threads: int, tokens: int, kv: str, extra_buffers: bool) -> dict[str, Any]:
        """Load a model for sequences of up to `tokens`: seconds, version, threads."""

    def prefill(self, tokens: int) -> float:
        """Rate of a prompt, computed from nothing, logits of its last token included."""

    def decode(self, depth: int, tokens: int) -> float:
        """Rate of one sequence that grows token by token from `depth`; what lies before is kept between calls."""

    def batch(self, sequences: int, depth: int, tokens: int) -> float:
        """Rate of all together, `tokens` each."""

    def logits(self, token_ids: list[int], out: str, as_prompt: bool) -> None:
        """Logits of every position as float32 [T, V] in an .npy file. as_prompt: computed as one prompt; else token by
        token, as when they are drawn."""

    def kv_bytes(self) -> int:
        """Memory of the KV cache now."""


def peak_memory() -> int:
    """Bytes: the most that this process has had resident."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def make_runner(name: str) -> Runner:
    if name == "ours":
        from edge_runtime.apps.bench_ours import OurRunner

        return OurRunner()
    from edge_runtime.apps.bench_llama_cpp import LlamaCppRunner

    return LlamaCppRunner()


def serve(runner: Runner, commands: Any, answers: Any) -> None:
    """One JSON answer per JSON command: {"result": ...} or {"error": ...}, until the commands end."""
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            result = peak_memory() if name == "peak_memory" else getattr(runner, name)(**command)
            answer = {"result": result}
        except Exception as error:  # told to the measuring process, which decides
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    # Libraries print to stdout: theirs goes to stderr, the answers keep the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(make_runner(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
