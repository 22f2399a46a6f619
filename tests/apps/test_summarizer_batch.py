"""OpenAI batch files: every good line answered, every bad one reported with its number."""
from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.apps.summarizer import Summarizer, Target
from edge_runtime.llm import LLM
from edge_runtime.sampling import SamplingParams
from tests.gguf_factory import write_model

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, context_length=256)


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, threads=1, max_batch=8) as opened:
        yield opened


def line(name: str, body: dict, url: str = CHAT, **more) -> bytes:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"model": "m", **body},
                       **more}).encode()


def answers(llm, tmp_path: Path, lines: list[bytes], form: str = "batch") -> list[dict]:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    job = Summarizer(llm, params=SamplingParams(max_tokens=8, temperature=0))
    list(job.run([tmp_path / "in.jsonl"], Target(tmp_path / "out.jsonl", form), fresh=True))
    return [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_every_kind_of_request_is_answered_as_the_engine_would(llm, tmp_path):
    greedy = {"temperature": 0, "max_tokens": 6}
    rows = answers(llm, tmp_path, [
        line("chat", {"messages": USER, **greedy}),
        line("parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello "}, {
            "type": "text", "text": "there"}]}], **greedy}),
        line("text", {"prompt": "Once upon", **greedy}, TEXT),
        line("ids", {"prompt": [65, 66, 67], **greedy}, TEXT),
        line("many", {"prompt": ["One", "Two"], **greedy, "n": 2}, TEXT),
        line("embed", {"input": ["a text", "another"]}, EMBED),
        line("tokens", {"input": llm.tokenize("a text")}, EMBED),
        line("bytes", {"input": "a text", "encoding_format": "base64"}, EMBED),
        line("probable", {"messages": USER, **greedy, "logprobs": True, "top_logprobs": 2}),
    ])
    assert all(row["error"] is None and row["response"]["status_code"] == 200 for row in rows)
    bodies = {row["custom_id"]: row["response"]["body"] for row in rows}
    chat = llm.chat("Hello there", temperature=0, max_tokens=6)
    for name in ("chat", "parts"):
        body = bodies[name]
        assert body["object"] == "chat.completion" and body["choices"][0]["message"]["content"] == chat.text
        assert body["choices"][0]["finish_reason"] == chat.finish_reason
        assert body["usage"] == {"prompt_tokens": chat.stats.prompt_tokens, "completion_tokens": 6,
                                 "total_tokens": chat.stats.prompt_tokens + 6}
    assert bodies["text"]["choices"][0]["text"] == llm.generate("Once upon", temperature=0, max_tokens=6).text
    assert bodies["ids"]["choices"][0]["text"] == llm.generate([65, 66, 67], temperature=0, max_tokens=6).text
    one, two = (llm.generate(text, temperature=0, max_tokens=6).text for text in ("One", "Two"))
    assert [c["text"] for c in bodies["many"]["choices"]] == [one, one, two, two]
    assert [c["index"] for c in bodies["many"]["choices"]] == [0, 1, 2, 3]
    vectors = np.array([row["embedding"] for row in bodies["embed"]["data"]])
    assert np.allclose(vectors, llm.embed(["a text", "another"]), atol=1e-5)
    assert np.allclose(bodies["tokens"]["data"][0]["embedding"], vectors[0], atol=1e-5)
    assert bodies["tokens"]["usage"] == bodies["bytes"]["usage"]
    raw = base64.b64decode(bodies["bytes"]["data"][0]["embedding"])
    assert np.allclose(struct.unpack(f"<{len(raw) // 4}f", raw), vectors[0], atol=1e-5)
    told = bodies["probable"]["choices"][0]["logprobs"]["content"]
    assert len(told) == 6 and all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in told)


def test_a_line_without_a_seed_gives_the_same_text_again_and_others_differ(llm, tmp_path):
    lines = [line(f"{i}", {"messages": USER, "max_tokens": 12}) for i in range(4)]
    texts = [row["response"]["body"]["choices"][0]["message"]["content"] for row in answers(llm, tmp_path, lines)]
    assert len(set(texts)) > 1
    assert texts == [row["response"]["body"]["choices"][0]["message"]["content"]
                     for row in answers(llm, tmp_path, lines)]
    [row] = answers(llm, tmp_path, [line("n", {"messages": USER, "max_tokens": 12, "n": 4, "seed": 1})])
    assert len({choice["message"]["content"] for choice in row["response"]["body"]["choices"]}) > 1


BAD = [
    (b"{not json", "not JSON"), (b"[1, 2]", "object expected"), (b'"text"', "object expected"),
    (b"\xff\xfe{}", "UTF-8"),
    (b"{}", "custom_id"), (b'{"custom_id": 5}', "custom_id"), (b"[" * 100_000, "not JSON"),
    (b'{"custom_id": "a", "method": "GET"}', "POST"), (b'{"custom_id": "a", "url": 3}', "url"),
    (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": []}', "body"),
    (line("b", {"messages": USER}, "/v1/images"), "/v1/chat/completions"),
    (line("c", {}), "messages"), (line("d", {"messages": "hi"}), "messages"), (line("e", {"messages": []}), "messages"),
    (line("f", {"messages": [{"role": "user", "content": 5}]}), "content"),
    (line("g", {"messages": USER, "temperature": "hot"}), "temperature"),
    (line("h", {"messages": USER, "max_tokens": 0}), "max_tokens"),
    (line("i", {"messages": USER, "max_tokens": "8"}), "max_tokens"),
    (line("j", {"messages": USER, "n": 0}), "n"), (line("k", {"messages": USER, "stream": True}), "stream"),
    (line("l", {"messages": USER, "wishes": 1}), "wishes"), (line("m", {"messages": USER, "stop": 5}), "stop"),
    (line("n", {"messages": USER, "logit_bias": {"x": 1}}), "logit_bias"),
    (line("o", {"messages": USER, "response_format": {"type": "xml"}}), "response_format"),
    (line("p", {"messages": [{"role": "user", "content": "word " * 500}]}), "context"),
    (line("q", {"prompt": 5}, TEXT), "prompt"), (line("r", {"input": []}, EMBED), "input"),
    (line("s", {"prompt": [999_999]}, TEXT), "999999"), (line("good0", {"messages": USER}), "earlier"),
]


@pytest.mark.parametrize("form", ["batch", "jsonl"])
def test_bad_lines_are_reported_with_their_numbers_and_good_ones_answered(llm, tmp_path, form):
    lines = [line("good0", {"messages": USER, "max_tokens": 2})]
    for i, (raw, _) in enumerate(BAD):
        lines += [raw, line(f"good{i + 1}", {"messages": USER, "max_tokens": 2}), b"  "]
    rows = answers(llm, tmp_path, lines, form)
    assert len(rows) == 2 * len(BAD) + 1
    for i, (_, word) in enumerate(BAD):
        bad, good = rows[1 + 2 * i], rows[2 + 2 * i]
        number = 2 + 3 * i
        message = bad["error"]["message"] if form == "batch" else bad["error"]
        assert f"line {number}: " in message and word in message, message
        assert (bad["error"]["line"] if form == "batch" else bad["line"]) == number
        assert good["custom_id"] == f"good{i + 1}"
        assert good["response"]["body"]["usage"]["completion_tokens"] == 2 if form == "batch" else good["text"]
    assert rows[15]["custom_id"] == "a" and rows[1]["custom_id"] is None  # a name is kept where the line had one


def test_a_line_that_is_too_long_is_reported_and_the_next_read(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.apps.summarizer.sources.MAX_LINE", 1000)
    rows = answers(llm, tmp_path, [b"x" * 5000, line("good", {"messages": USER, "max_tokens": 2}), b"y" * 1000,
                                   line("last", {"messages": USER, "max_tokens": 2})])
    assert [row["custom_id"] for row in rows] == [None, "good", None, "last"]
    assert rows[0]["error"]["line"] == 1 and rows[2]["error"]["line"] == 3


def test_a_large_file_is_streamed_in_flat_memory(model, tmp_path):
    """6,000 lines in a process of their own: its memory at the end is that after the first ones, and room for noise."""
    with open(tmp_path / "in.jsonl", "wb") as file:
        for i in range(6000):
            file.write(b"{bad\n" if i % 100 == 17 else
                       line(f"r{i}", {"prompt": [65 + i % 50, 66 + i % 7], "max_tokens": 2, "temperature": 0,
                                      "user": "u" * 2000}, TEXT) + b"\n")
    code = """
import gc, sys, psutil
from pathlib import Path
from edge_runtime.llm import LLM
from edge_runtime.apps.summarizer import Summarizer, Target
from edge_runtime.sampling import SamplingParams
here, seen = psutil.Process(), []
with LLM(sys.argv[1], threads=1, max_batch=32) as llm:
    job = Summarizer(llm, params=SamplingParams(max_tokens=2))
    for number, entry in enumerate(job.run([Path(sys.argv[2])], Target(Path(sys.argv[3]), "batch"))):
        if number % 500 == 499:
            seen.append(here.memory_info().rss >> 20)
print(*seen)
"""
    done = subprocess.run([sys.executable, "-c", code, str(model), str(tmp_path / "in.jsonl"),
                           str(tmp_path / "out.jsonl")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seen = [int(value) for value in done.stdout.split()]
    assert len(seen) == 12 and max(seen[2:]) - seen[2] < 16, seen  # the input alone is 12 MB
    rows = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["error"]["line"] for row in rows if row["error"]] == list(range(18, 6001, 100))
    assert [row["custom_id"] for row in rows if row["response"]] == [f"r{i}" for i in range(6000) if i % 100 != 17]
