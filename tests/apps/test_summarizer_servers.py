"""Running servers as backends: shared load, retries, servers that die, refusals."""
from __future__ import annotations

import json
import threading

import pytest
from typer.testing import CliRunner

from edge_runtime.apps.summarizer import (
    LocalBackend,
    ServerBackend,
    ServersUnreachableError,
    Summarizer,
    Summary,
    Target,
)
from edge_runtime.cli import app
from edge_runtime.errors import InvalidRequestError, MissingExtraError
from edge_runtime.llm import LLM
from tests.apps.openai_server import said, serving
from tests.gguf_factory import write_model

PROMPT = "Sum: {document}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, context_length=256)


@pytest.fixture(scope="module")
def local(model):
    with LLM(model, threads=1) as llm:
        yield LocalBackend(llm)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("edge_runtime.apps.summarizer.servers.PAUSES", (0.02, 0.05, 0.1, 0.1, 0.1))


@pytest.fixture
def documents(tmp_path):
    for i in range(40):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i:02}.txt").write_text(f"Text {i}.")
    return tmp_path / "in"


def texts(backend, folder, **options) -> list[str | None]:
    return [Summary.of(entry).text for entry in Summarizer(backend, prompt=PROMPT, **options).run([folder])]


EXPECTED = [said(f"Sum: Text {i}.") for i in range(40)]


def test_servers_share_the_load_and_answers_keep_their_order(local, documents):
    with serving(3, delay=0.01) as servers:
        backend = ServerBackend([server.url for server in servers], local, slots=4, api_key="key")
        assert (backend.model, backend.context) == ("fake-model", 700)
        assert texts(backend, documents) == EXPECTED
        backend.close()
        counts = [len(server.requests) for server in servers]
        assert sum(counts) == 40 and min(counts) >= 8, counts
        assert all(request["key"] == "Bearer key" for server in servers for request in server.requests)
        assert max(server.most for server in servers) >= 3  # several at once
        body = servers[0].requests[0]["body"]
        assert body["model"] == "fake-model" and body["temperature"] == 0 and body["max_tokens"] == 256


@pytest.mark.parametrize("wrong", [503, 429, 500, "drop"])
def test_what_fails_is_sent_again(local, documents, wrong):
    with serving(2, fail=lambda number: wrong if number % 3 == 0 else None) as servers:
        backend = ServerBackend([server.url for server in servers], local)
        assert texts(backend, documents) == EXPECTED
        backend.close()


def test_a_server_that_dies_leaves_its_work_to_the_others(local, documents):
    with serving(2, delay=0.01) as servers:
        backend = ServerBackend([server.url for server in servers], local, slots=2)
        threading.Timer(0.05, servers[0].close).start()
        assert texts(backend, documents) == EXPECTED
        backend.close()
        assert len(servers[1].requests) >= 20  # its own half at least


def test_when_none_answers_the_job_stops_and_goes_on_later(local, documents, tmp_path):
    out = tmp_path / "o.jsonl"
    with serving(1, fail=lambda number: None if number < 10 else 503) as [server]:
        backend = ServerBackend([server.url], local, slots=2, patience=0.4)
        with pytest.raises(ServersUnreachableError, match="same command"):
            list(Summarizer(backend, prompt=PROMPT).run([documents], Target(out)))
        backend.close()
    with serving(1) as [server]:
        backend = ServerBackend([server.url], local)
        job = Summarizer(backend, prompt=PROMPT)
        list(job.run([documents], Target(out)))
        backend.close()
        assert len(server.requests) == 30 and job.totals.kept + job.totals.reused == 10
    assert [json.loads(line)["summary"] for line in out.read_text().splitlines()] == EXPECTED
    with pytest.raises(ServersUnreachableError):
        ServerBackend(["http://127.0.0.1:9"], local, patience=0.2)


def test_a_request_that_is_refused_fails_alone(local, documents):
    with serving(1, fail=lambda number: 400 if number == 3 else None) as [server]:
        backend = ServerBackend([server.url], local, slots=1)
        found = [Summary.of(entry) for entry in Summarizer(backend, prompt=PROMPT).run([documents])]
        backend.close()
    [bad] = [summary for summary in found if summary.error is not None]
    assert "played 400" in bad.error and len(server.requests) == 40


@pytest.mark.parametrize("answer", [{}, {"error": "overloaded"}, {"choices": []}, {"choices": None, "usage": [1]}])
def test_an_answer_without_choices_is_no_empty_summary(local, documents, monkeypatch, answer):
    with serving(1) as [server]:
        backend = ServerBackend([server.url], local)
        real = backend._send
        monkeypatch.setattr(backend, "_send", lambda method, path, body, stop: answer if "Text 3." in str(body) else
                            real(method, path, body, stop))
        found = [Summary.of(entry) for entry in Summarizer(backend, prompt=PROMPT).run([documents])]
        backend.close()
    assert [i for i, summary in enumerate(found) if summary.error is not None] == [3]
    assert found[3].text is None and "no choices" in found[3].error


def test_long_documents_are_cut_for_the_servers_context(local, tmp_path):
    (tmp_path / "long.txt").write_text("\n\n".join(f"Paragraph {i} tells something of its own." for i in range(80)))
    with serving(1) as [server]:
        backend = ServerBackend([server.url], local)
        [entry] = Summarizer(backend, prompt=PROMPT).run([tmp_path / "long.txt"])
        backend.close()
        assert Summary.of(entry).chunks > 2 and len(server.requests) == Summary.of(entry).chunks + 1
        for request in server.requests:
            assert local.count(request["body"]["messages"][0]["content"]) < 700 - 256


def test_sentences_are_scored_by_the_local_model(local, tmp_path):
    (tmp_path / "a.txt").write_text("A boat came in. A boat came in. The harbour master wrote down its name.")
    with serving(1) as [server]:
        backend = ServerBackend([server.url], local)
        [extract] = Summarizer(backend, strategy="extractive", length=5).run([tmp_path / "a.txt"])
        assert not server.requests and (Summary.of(extract).text or "") in (tmp_path / "a.txt").read_text()
        [short] = Summarizer(backend, compress=0.5, prompt=PROMPT).run([tmp_path / "a.txt"])
        backend.close()
        assert len(server.requests) == 1 and Summary.of(short).text


def test_batch_files_go_to_the_servers_as_they_are(model, tmp_path):
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions" if i % 2 else "/v1/chat/completions",
              "body": {"model": "other", "prompt": f"p{i}", "messages": [{"role": "user", "content": f"p{i}"}],
                       "tools": [{"type": "function"}]}} for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [*lines, "bad"])))
    with serving(2) as servers:
        arguments = ["summarize", str(tmp_path / "in.jsonl"), "-m", str(model), "-o", str(tmp_path / "out.jsonl")]
        for server in servers:
            arguments += ["--server", server.url]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1 and "20 of 21 requests" in done.stderr, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows[:20]):
        choice = row["response"]["body"]["choices"][0]
        assert (choice.get("text") or choice["message"]["content"]) == said(f"p{i}")
    assert rows[20]["error"]["line"] == 21
    assert all(request["body"]["model"] == "fake-model" and request["body"]["tools"] for server in servers
               for request in server.requests)


def test_what_cannot_be_is_refused(local, monkeypatch):
    with pytest.raises(InvalidRequestError, match="server"):
        ServerBackend(["localhost:8000"], local)
    with pytest.raises(InvalidRequestError, match="a URL such as"):
        ServerBackend(["http://[::1"], local)
    with pytest.raises(InvalidRequestError, match="concurrency"):
        ServerBackend(["http://localhost:8000"], local, slots=0)
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(MissingExtraError, match="documents"):
        ServerBackend(["http://localhost:8000"], local)
