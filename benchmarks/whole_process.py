"""Figures of a whole process: from its start to the first token, and the most memory it holds."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from edge_runtime.apps.bench_client import candidate_paths

OUR_START = """
import sys
from edge_runtime import LLM
llm = LLM(sys.argv[1], threads=int(sys.argv[2]))
ids = list(range(300, 316))
print(llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True).token_ids[0], flush=True)
"""
PEER_START = """
import sys
import llama_cpp
defaults = llama_cpp.llama_model_default_params
def params():
    p = defaults()
    if sys.argv[3] == "False":
        p.use_extra_bufts = False
    return p
llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = params
threads = int(sys.argv[2])
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=threads, n_threads_batch=threads, flash_attn=True,
                      verbose=False)
print(next(iter(llm.generate(list(range(300, 316)), temp=0.0))), flush=True)
"""
OUR_MEMORY = """
import json, sys
from edge_runtime import LLM
from edge_runtime.apps.bench_worker import peak_memory
llm = LLM(sys.argv[1], threads=int(sys.argv[2]))
prompt, reply = 512, 64
llm.generate([300 + i % 200 for i in range(prompt)], max_tokens=reply, temperature=0, ignore_eos=True)
pages = -(-(prompt + reply) // 64)
print(json.dumps({"peak": peak_memory(), "kv": pages * llm.plan.kv_page_bytes}), flush=True)
"""


class ProcessFailed(Exception):
    """A measured process ended without its answer: how."""


def first_line(code: str, *arguments: object, search_path: str | None = None) -> tuple[float, str]:
    """Seconds from the start of a Python process to its first line, and the line."""
    environment = dict(os.environ)
    if search_path:
        environment["PYTHONPATH"] = search_path
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - began
    _, errors = process.communicate()
    if not line:
        last = errors.strip().splitlines()[-1:] or [""]
        raise ProcessFailed(f"exit code {process.returncode} {last[0][:200]}")
    return seconds, line


def warm_start(path: Path, threads: int, repeat: int) -> dict[str, float | str | None]:
    """Median seconds to the first token of a 16-token prompt, ours and llama-cpp-python's fastest build, in turns. The
    file is in the page cache and the kernels are compiled before."""
    first_line(OUR_START, path, threads)
    builds, notes = [], []
    for search_path in candidate_paths():
        for extra in (True, False):
            try:
                first_line(PEER_START, path, threads, extra, search_path=search_path)
            except ProcessFailed as error:
                notes.append(f"llama-cpp-python{'' if extra else ' without repacked weights'}: {error}")
                continue
            builds.append((search_path, extra))
            break
    ours: list[float] = []
    theirs: list[list[float]] = [[] for _ in builds]
    for _ in range(repeat):
        ours.append(first_line(OUR_START, path, threads)[0])
        for (search_path, extra), found in zip(builds, theirs):
            found.append(first_line(PEER_START, path, threads, extra, search_path=search_path)[0])
    return {"ours": statistics.median(ours), "peer": min(map(statistics.median, theirs), default=None),
            "notes": "; ".join(notes)}


def peak_beyond_file(path: Path, threads: int) -> tuple[float, str]:
    """Bytes of the peak resident set beyond file size and KV in use, of a process that read 512 tokens and wrote 64."""
    found = json.loads(first_line(OUR_MEMORY, path, threads)[1])
    size = path.stat().st_size
    return found["peak"] - size - found["kv"], (
        f"peak {found['peak'] / 1e6:.0f} MB, file {size / 1e6:.0f} MB, KV {found['kv'] / 1e6:.0f} MB")
