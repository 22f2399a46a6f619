"""The batch summarizer's figures: against llama-cpp-python's sequential loop, killed at random points, and a long file.

    python benchmarks/apps_summarizer.py --quick --models ~/models-bench
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import cached
from whole_process import ProcessFailed

from edge_runtime.apps.bench_client import candidate_paths

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "Summarize the text below.\n\n{document}"
# Both read and write the same: prompts of so many tokens, replies of so many whatever the end token says.
OURS = """
import json, sys, time
from pathlib import Path
from edge_runtime import LLM, SamplingParams
from edge_runtime.apps.summarizer import Summarizer, Target
model, folder, out, threads, tokens, prompt = sys.argv[1:]
params = SamplingParams(max_tokens=int(tokens), temperature=0.0, ignore_eos=True)
with LLM(model, threads=int(threads), context=4096) as llm:
    llm.generate([5] * 600, params, max_tokens=2)
    job = Summarizer(llm, prompt=prompt, params=params)
    began = time.perf_counter()
    list(job.run([Path(folder)], Target(Path(out)), fresh=True))
    t = job.totals
    assert not t.failed, "a document failed"
    print(json.dumps({"seconds": time.perf_counter() - began, "documents": t.documents, "in": t.prompt_tokens,
                      "out": t.completion_tokens}), flush=True)
"""
PEER = """
import json, sys, time
from pathlib import Path
import llama_cpp
model, folder, extra, threads, tokens, prompt, most = sys.argv[1:]
defaults = llama_cpp.llama_model_default_params
def params():
    p = defaults()
    if extra == "False":
        p.use_extra_bufts = False
    return p
llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = params
llm = llama_cpp.Llama(model, n_ctx=4096, n_threads=int(threads), n_threads_batch=int(threads), flash_attn=True,
                      verbose=False, logit_bias=None)
end = {llm.token_eos(): float("-inf")}
llm.create_completion("a", max_tokens=2)
counted = written = 0
began = time.perf_counter()
files = sorted(Path(folder).iterdir())[:int(most)]
for file in files:
    llm.reset()
    said = llm.create_completion(prompt.replace("{document}", file.read_text()), max_tokens=int(tokens),
                                 temperature=0.0, logit_bias=end)
    counted += said["usage"]["prompt_tokens"]
    written += said["usage"]["completion_tokens"]
print(json.dumps({"seconds": time.perf_counter() - began, "documents": len(files), "in": counted, "out": written}),
      flush=True)
"""
STREAMED = """
import json, sys, time
from pathlib import Path
import psutil
from edge_runtime import LLM
from edge_runtime.apps.summarizer import Summarizer, Target
source, out, threads = sys.argv[1:]
here, seen, began = psutil.Process(), [], time.perf_counter()
with LLM(threads=int(threads)) as llm:
    job = Summarizer(llm)
    for number, entry in enumerate(job.run([Path(source)], Target(Path(out), "batch"), fresh=True)):
        if number % 100 == 99:
            seen.append(here.memory_info().rss)
    t = job.totals
print(json.dumps({"seconds": time.perf_counter() - began, "rss": seen, "in": t.prompt_tokens,
                  "out": t.completion_tokens}), flush=True)
"""
LINE_TOKENS = 8


def rows(quick: bool, models: Path | None = None, threads: int = 2) -> list[dict[str, Any]]:
    """{"name", "value", "must", "goal", "better", "detail"} each. models: folder that keeps the model files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return [*against_llama_cpp(quick, models or folder, folder, threads), killed(quick, folder),
                *long_file(quick, folder, threads)]


def against_llama_cpp(quick: bool, models: Path, scratch: Path, threads: int) -> list[dict[str, Any]]:
    documents, length, tokens, theirs = (8, 400, 16, 1) if quick else (32, 2000, 128, 4)
    folder = scratch / "documents"
    folder.mkdir()
    rng = random.Random(3)
    for i in range(documents):  # a character of these is a token of the random model's
        text = "".join(rng.choice("abcdefghijklmnopqrstuvwxy  .") for _ in range(length))
        (folder / f"{i:02}.txt").write_text(text)
    model = cached("llama1b", "Q4_0", models)
    ours = answer(OURS, model, folder, scratch / "ours.jsonl", threads, tokens, PROMPT)
    rate = (ours["in"] + ours["out"]) / ours["seconds"]
    peers: list[tuple[float, str]] = []
    notes: list[str] = []
    for path in candidate_paths():
        for extra in (True, False):
            label = f"{Path(path).name if path else 'installed'}{'' if extra else ', without repacked weights'}"
            try:
                answer(PEER, model, folder, extra, threads, 1, PROMPT, 1, search_path=path)  # does it work at all?
                found = answer(PEER, model, folder, extra, threads, tokens, PROMPT, theirs, search_path=path)
            except ProcessFailed as error:
                notes.append(f"llama-cpp-python {label}: {error}")
                continue
            peers.append(((found["in"] + found["out"]) / found["seconds"],
                          f"{label}: {found['in'] // theirs} + {found['out'] // theirs} tokens a document"))
            break
    best = max(peers, default=None)
    detail = f"{rate:.1f} tokens/s read and written ({ours['in'] // documents} + {ours['out'] // documents} a document)"
    if best:
        detail += f", llama-cpp-python {best[0]:.1f} ({best[1]}; {theirs} documents one after the other)"
    return [row(f"summarizer, llama1b Q4_0, {documents} documents x {length} tokens, x llama-cpp-python's loop",
                rate / best[0] if best else None, 2.5, 4.0, "higher", "; ".join([detail, *notes]))]


def killed(quick: bool, scratch: Path) -> dict[str, Any]:
    """The bundled model on many documents; kill -9 at random points, the same command again, until it ends."""
    kills = 5 if quick else 20
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    folder = scratch / "texts"
    folder.mkdir()
    texts = [file.read_text(encoding="utf-8") for file in sorted(EXAMPLES.rglob("*.txt"))]
    for i in range(120 if quick else 400):
        parts = rng.choices(texts, k=rng.choice((1, 1, 2, 24)))
        (folder / f"{i:03}.txt").write_text("\n\n".join([f"Number {i}", *parts]), encoding="utf-8")
    command = [sys.executable, "-m", "edge_runtime.cli", "summarize", str(folder), "-n", "64"]
    whole, output = scratch / "whole.jsonl", scratch / "killed.jsonl"
    began = time.perf_counter()
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True)
    took = time.perf_counter() - began
    hits = runs = 0
    same = True
    while hits < kills and runs < 4 * kills:
        runs += 1
        process = subprocess.Popen([*command, "-o", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ledger = Path(f"{output}.ledger")
        while not ledger.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 2.5 * took / kills)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            hits += 1
        else:  # it came to its end between two kills: compare, and begin again
            same &= output.read_bytes() == whole.read_bytes()
            output.unlink()
            ledger.unlink()
    subprocess.run([*command, "-o", str(output)], check=True, capture_output=True)
    same &= output.read_bytes() == whole.read_bytes()
    return row(f"summarizer killed {kills} times at random points, same output as never killed", float(same), 1.0, 1.0,
               "higher", f"{hits} kills in {runs} runs, seed {seed}, {whole.stat().st_size} bytes")


def long_file(quick: bool, scratch: Path, threads: int) -> list[dict[str, Any]]:
    lines = 3_000 if quick else 100_000
    bad = {i for i in range(lines) if i % 100 == 57}
    source, out = scratch / "requests.jsonl", scratch / "answers.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for i in range(lines):
            message = {"role": "user", "content": f"The bridge at Norvale closes on day {i}. When does it close?"}
            body = {"model": "m", "messages": [message], "max_tokens": LINE_TOKENS, "temperature": 0,
                    "ignore_eos": True}
            request = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write((json.dumps(request)[:-2] if i in bad else json.dumps(request)) + "\n")
    found = answer(STREAMED, source, out, threads)
    right = 0
    with open(out, encoding="utf-8") as answers:
        for i, line in enumerate(answers):
            told = json.loads(line)
            if i in bad:
                right += told["error"] is not None and told["error"]["line"] == i + 1
            else:
                body = (told["response"] or {}).get("body", {})
                right += told["custom_id"] == f"r{i}" and body["usage"]["completion_tokens"] == LINE_TOKENS
    rss = found["rss"]
    early = rss[len(rss) // 10]  # caches and buffers are full by then
    return [row(f"{lines:,}-line JSONL, {LINE_TOKENS} tokens out each: share of lines answered or reported by number",
                right / lines, 1.0, 1.0, "higher",
                f"{len(bad):,} malformed; {found['seconds']:.0f} s, {lines / found['seconds']:.0f} lines/s, "
                f"{found['in'] / found['seconds']:.0f} + {found['out'] / found['seconds']:.0f} tokens/s"),
            row(f"{lines:,}-line JSONL: memory gained after its first tenth, MB", (max(rss) - early) / 1e6, 64.0, 16.0,
                "lower", f"{early / 1e6:.0f} MB then, {max(rss) / 1e6:.0f} MB at most, the file has "
                         f"{source.stat().st_size / 1e6:.0f} MB")]


def row(name: str, value: float | None, must: float, goal: float, better: str, detail: str) -> dict[str, Any]:
    return {"name": name, "value": value, "must": must, "goal": goal, "better": better, "detail": detail}


def answer(code: str, *arguments: object, search_path: str | None = None) -> dict[str, Any]:
    """The JSON that a Python process prints. Raises ProcessFailed."""
    environment = {**os.environ, **({"PYTHONPATH": search_path} if search_path else {})}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env=environment)
    if done.returncode or not done.stdout.strip():
        last = done.stderr.strip().splitlines()[-1:] or [""]
        raise ProcessFailed(f"exit code {done.returncode} {last[0][:200]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", type=Path, help="folder that keeps the model files")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    print(json.dumps(rows(a.quick, a.models, a.threads), indent=2))


if __name__ == "__main__":
    main()
