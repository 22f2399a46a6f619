"""The server's figures: answers under 64 clients, and what serving costs over the engine at 16.

    python benchmarks/apps_server.py [--quick]

Clients are bare sockets in this process, so that what is measured is the server: on two cores a full client would take
as much of them. The engine beside it is an LLM in this process with the same model and threads, idle while the server
is measured; runs take turns, and the median of their ratios counts.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edge_runtime import LLM, SamplingParams

MODEL = "edge-tiny"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
START_SECONDS = 180.0
SUBJECTS = ("museum", "harvest", "bridge", "library", "school", "market", "river", "garden", "hospital", "station",
            "theatre", "bakery", "harbour", "airport", "village", "tower", "forest", "island", "castle", "mill")
EVENTS = ("opens on Monday", "is closed for repairs", "was sold last week", "needs new windows", "has a new manager")


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """Host and port of an `edge-runtime serve` with the bundled model."""
    process = subprocess.Popen([sys.executable, "-m", "edge_runtime.cli", "serve", "--port", "0", *options],
                               stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    try:
        deadline = time.monotonic() + START_SECONDS
        for line in process.stderr:
            said += line
            found = re.search(r"at http://([0-9.]+):(\d+)/v1", line)
            if found or time.monotonic() > deadline:
                break
        if not found:
            raise RuntimeError(f"the server did not start: {said}")
        # It must not stop at a pipe that nobody reads.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found.group(1), int(found.group(2))
    finally:
        process.terminate()
        process.wait(60)


class Client(asyncio.Protocol):
    """One connection that is kept; `ask` sends a request and returns the status and body of its answer."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._chunked = False
        self._need = -1  # bytes of head and body together, once the head says so
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        if self._need < 0 and not self._chunked:
            end = self._bytes.find(b"\r\n\r\n")
            if end < 0:
                return
            length = re.search(rb"content-length: (\d+)", self._bytes[:end])
            self._chunked = length is None
            self._need = -1 if length is None else end + 4 + int(length.group(1))
        whole = self._bytes.endswith(b"0\r\n\r\n") if self._chunked else len(self._bytes) >= self._need
        if whole and self._answer is not None:
            head, _, body = bytes(self._bytes).partition(b"\r\n\r\n")
            self._answer.set_result((int(head[9:12]), _unchunked(body) if self._chunked else body))
            self._answer = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        self._bytes.clear()
        self._need, self._chunked = -1, False
        self._answer = asyncio.get_running_loop().create_future()
        data = json.dumps(body).encode()
        self._transport.write(f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                              f"content-length: {len(data)}\r\n\r\n".encode() + data)
        return await self._answer


def _unchunked(body: bytes) -> bytes:
    out, at = bytearray(), 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if not size:
            return bytes(out)
        out += body[end + 2:end + 2 + size]
        at = end + 4 + size


def text_of(status: int, answer: bytes, stream: bool) -> str:
    """The reply's text; raises where the answer is no good one."""
    if status != 200:
        raise RuntimeError(f"status {status}: {answer[:200]!r}")
    if not stream:
        return json.loads(answer)["choices"][0]["message"]["content"]
    events = [event.removeprefix(b"data: ") for event in answer.split(b"\n\n") if event]
    if events[-1] != b"[DONE]":
        raise RuntimeError(f"the stream has no end: {events[-1][:200]!r}")
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


async def crowd(address: tuple[str, int], prompts: list[str], wanted: list[str], clients: int,
                tokens: int) -> tuple[list[str], list[int]]:
    """Every prompt asked once, by so many clients at once, every other as a stream: errors, and indices of answers that
    are not the engine's own."""
    todo = iter(range(len(prompts)))
    errors: list[str] = []
    wrong: list[int] = []

    async def work() -> None:
        _, client = await asyncio.get_running_loop().create_connection(Client, *address)
        for i in todo:
            stream = i % 2 == 0
            try:
                found = text_of(*await client.ask(CHAT, {
                    "model": MODEL, "messages": [{"role": "user", "content": prompts[i]}], "temperature": 0,
                    "max_tokens": tokens, "stream": stream}), stream)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
                _, client = await asyncio.get_running_loop().create_connection(Client, *address)
                continue
            if found != wanted[i]:
                wrong.append(i)

    await asyncio.gather(*(work() for _ in range(clients)))
    return errors, wrong


async def load(address: tuple[str, int], prompts: list[str], tokens: int, stream: bool, rounds: int) -> float:
    """Tokens per second of one client for each prompt, each asking `rounds` times."""
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, *address))[1] for _ in prompts]

    async def work(client: Client, prompt: str) -> None:
        for _ in range(rounds):
            status, answer = await client.ask(COMPLETIONS, {
                "model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True,
                "stream": stream})
            if status != 200:
                raise RuntimeError(answer[:200])

    began = time.perf_counter()
    await asyncio.gather(*(work(client, prompt) for client, prompt in zip(clients, prompts)))
    return len(prompts) * rounds * tokens / (time.perf_counter() - began)


def engine_speed(llm: LLM, prompts: list[str], tokens: int, rounds: int) -> float:
    """The same work without a server: one list of prompts for each round."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    for _ in range(rounds):
        llm.generate(prompts, params)
    return len(prompts) * rounds * tokens / (time.perf_counter() - began)


def answers(quick: bool) -> dict[str, Any]:
    count, clients, tokens = (200, 64, 16) if quick else (1000, 64, 24)
    prompts = [f"Summarize the following text.\n\nThe {SUBJECTS[i % 20]} {EVENTS[i // 20 % 5]}. It is number {i}."
               for i in range(count)]
    with LLM() as llm:
        wanted = [reply.text for reply in (llm.chat(prompt, temperature=0, max_tokens=tokens) for prompt in prompts)]
    with server() as address:
        began = time.perf_counter()
        errors, wrong = asyncio.run(crowd(address, prompts, wanted, clients, tokens))
        seconds = time.perf_counter() - began
    detail = f"{count} requests in {seconds:.1f} s, {len(set(wanted))} different answers"
    for name, found in (("errors", errors), ("mixed up", wrong)):
        detail += f"; {len(found)} {name}" + (f", first {found[0]}" if found else "")
    return {"name": f"server, {clients} clients at once, {count} requests: errors and mixed-up answers",
            "value": float(len(errors) + len(wrong)), "must": 0.0, "goal": 0.0, "better": "lower", "detail": detail}


def overhead(quick: bool) -> list[dict[str, Any]]:
    clients, tokens, rounds, turns = (16, 128, 1, 3) if quick else (16, 256, 3, 7)
    prompts = [f"Number {i}: the {SUBJECTS[i]} {EVENTS[i % 5]}." for i in range(clients)]
    found: dict[bool, list[float]] = {True: [], False: []}
    speeds: dict[str, list[float]] = {"engine": [], "stream": [], "whole": []}
    with LLM() as llm, server() as address:
        engine_speed(llm, prompts, 16, 1)
        asyncio.run(load(address, prompts, 16, True, 1))
        for _ in range(turns):
            for stream in (True, False):
                before = engine_speed(llm, prompts, tokens, rounds)
                served = asyncio.run(load(address, prompts, tokens, stream, rounds))
                after = engine_speed(llm, prompts, tokens, rounds)
                found[stream].append(100 * (1 - served / ((before + after) / 2)))
                speeds["engine"] += [before, after]
                speeds["stream" if stream else "whole"].append(served)
    rows = []
    for stream, name in ((True, "stream"), (False, "whole")):
        detail = (f"engine {statistics.median(speeds['engine']):.0f} tokens/s, server "
                  f"{statistics.median(speeds[name]):.0f}; {turns} turns from {min(found[stream]):.1f} to "
                  f"{max(found[stream]):.1f} %")
        title = "streams" if stream else "whole answers"
        rows.append({"name": f"server overhead over the engine, {clients} clients, {title}, %",
                     "value": statistics.median(found[stream]), "must": 10.0, "goal": 3.0, "better": "lower",
                     "detail": detail})
    return rows


def rows(quick: bool) -> list[dict[str, Any]]:
    """What is promised of the server: name, value, must, goal, better ("lower"), detail."""
    return [answers(quick), *overhead(quick)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    for row in rows(parser.parse_args().quick):
        print(f"{row['name']}: {row['value']:.2f} (must {row['must']:g}, goal {row['goal']:g}) {row['detail']}")
