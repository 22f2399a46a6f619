"""What a server must bear: malformed and huge bodies on a raw socket, clients that leave, keys, names, a shutdown."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("uvicorn")

from edge_runtime import LLM
from edge_runtime.apps.model_host import ModelHost
from edge_runtime.apps.server import chat, guard
from edge_runtime.apps.server.settings import ServerSettings
from edge_runtime.errors import InvalidRequestError
from tests.apps.servers import PATIENCE, ServerProcess, echo_llm, serving
from tests.edge_runtime.llms import settled
from tests.gguf_factory import write_model

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
LONG = {**HELLO, "max_tokens": 3000}


def exchange(url: str, raw: bytes, patience: float = PATIENCE) -> bytes:
    """What a server answers to raw bytes, until it closes or the answer is whole."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=patience) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has seen enough
            connection.sendall(raw)
        answer = b""
        while True:
            try:
                part = connection.recv(65536)
            except ConnectionResetError:
                return answer
            answer += part
            if not part or _whole(answer):
                return answer


def _whole(answer: bytes) -> bool:
    head, mark, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(mark) and length is not None and len(body) >= int(length.group(1))


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json",
             f"content-length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def call(url: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] == b"{" else {"text": text.decode()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def first_event(connection: socket.socket) -> bytes:
    answer = b""
    while b"data:" not in answer:
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


def until(condition, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@pytest.fixture
def echo():
    llm = echo_llm()
    with serving(ModelHost.of(llm, "echo"), max_body_bytes=1_000_000) as url:
        yield url, llm


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("body, code", [
    (b"", "invalid_json"), (b"{", "invalid_json"), (b'{"model": "echo",}', "invalid_json"),
    (b"\xff\xfe{}", "invalid_json"),
    (b'{"model": "\xed\xa0\x80"}', "invalid_json"), (b'{"model": "\\ud800"}', "invalid_json"), (b"NaN", "invalid_json"),
    (b"[" * 100_000, "invalid_json"), (b'{"a":' * 5000 + b"1" + b"}" * 5000, "invalid_json"), (b"null", "invalid_type"),
    (b'"text"', "invalid_type"), (b"[]", "invalid_type"), (b"{}", "missing_required_parameter"),
    (b'{"model": 1, "messages": []}', "invalid_type"), (b'{"model": "echo", "messages": []}', "empty_array"),
    (b'{"model": "echo", "messages": [1]}', "invalid_type"),
    (b'{"model": "echo", "messages": [{"role": "user", "content": "x"}], "n": 1e999}', "invalid_json"),
])
def test_malformed_bodies(echo, body, code):
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/embeddings"):
        head, _, answer = exchange(echo[0], post(path, body)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400"), head
        error = json.loads(answer)["error"]
        if path == CHAT:
            assert error["code"] == code, error
    settled(echo[1])


@pytest.mark.parametrize("path, body, code, param", [
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
     "invalid_value", "messages[0].content[0].type"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
     "invalid_value", "input[0].content[0].type"),
    ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    ("/v1/responses", {"input": [{"type": "function_call", "call_id": "1", "arguments": "{}"}]},
     "missing_required_parameter", "input[0].name"),
    (CHAT, {**HELLO, "tool_choice": {"type": "allowed_tools"}}, "invalid_value", "tool_choice.type"),
    (CHAT, {**HELLO, "chat_template_kwargs": {"tools": 3}}, "invalid_value", "chat_template_kwargs"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "array_above_max_length", "input"),
    ("/v1/embeddings", {"input": [[1], [99999]]}, "invalid_value", "input[1]"),
    ("/v1/embeddings", {"input": ["a", 1]}, "invalid_type", "input[1]"),
])
def test_errors_name_the_place(echo, path, body, code, param):
    status, answer = call(echo[0], path, {"model": "echo", **body})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param), answer


def test_bodies_beyond_the_limit_are_refused_unread(echo):
    url = echo[0]
    large = b'{"model": "echo", "x": "' + b"y" * 10_000_000 + b'"}'
    for raw in (post(CHAT, large), post(CHAT, b"", length=10_000_000),
                post(CHAT, b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large), "transfer-encoding: chunked").replace(
                    b"content-length", b"x-length", 1)):
        answer = exchange(url, raw)
        assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer, answer[:300]
    fits = {**HELLO, "messages": [{"role": "user", "content": "x" * 900_000}]}
    assert call(url, CHAT, fits)[1]["error"]["code"] == "context_length_exceeded"
    assert call(url, CHAT, HELLO | {"max_tokens": 2})[0] == 200


def test_a_client_that_sends_all_before_it_reads_gets_the_refusal_whole(echo):
    for _ in range(5):
        connection = http.client.HTTPConnection(echo[0].removeprefix("http://"), timeout=PATIENCE)
        connection.request("POST", CHAT, b" " * 12_000_000, {"content-type": "application/json"})
        time.sleep(0.05)  # an answer that a reset had followed would be gone by now
        answer = connection.getresponse()
        assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
        connection.close()


def test_a_body_without_an_end_is_not_read_for_ever(echo, monkeypatch):
    monkeypatch.setattr(guard, "LINGER_SECONDS", 0.3)
    host, _, port = echo[0].removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(post(CHAT, b"", length=10**15))
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < began + PATIENCE:
                connection.sendall(b" " * 65536)
    assert call(echo[0], "/health")[0] == 200


def test_garbage_instead_of_http(echo):
    assert b"400" in exchange(echo[0], b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    assert call(echo[0], "/health")[0] == 200


def test_paths_methods_and_types_that_are_not_there(echo):
    url = echo[0]
    assert call(url, "/v1/nothing")[1]["error"]["code"] == "unknown_url"
    assert call(url, CHAT) == (405, {"error": {"message": f"Not allowed to GET on {CHAT}.", "param": None,
                                               "type": "invalid_request_error", "code": "method_not_allowed"}})
    assert call(url, CHAT, HELLO, **{"content-type": "text/plain"})[0] == 415
    assert call(url, "/v1/models/gpt")[1]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(stream):
    llm = echo_llm(delay=0.01)
    with serving(ModelHost.of(llm, "echo")) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
        connections = [socket.create_connection((host, int(port))) for _ in range(3)]
        for connection in connections:
            connection.sendall(post(CHAT, body))
        if stream:
            first_event(connections[0])
        until(lambda: llm.status().running == 6)
        for connection in connections:
            connection.close()
        until(lambda: llm.status().idle and not llm.engine._open, 20)
        steps = llm.engine.steps
        assert steps < 2500, "the requests ran to their end"
        settled(llm)
        assert call(url, CHAT, {**HELLO, "max_tokens": 3})[0] == 200
        assert 'status="499"' in call(url, "/metrics")[1]["text"]


def test_a_client_that_leaves_during_its_prompt():
    llm = echo_llm(delay=0.2, max_rows=64, context=16384)
    with serving(ModelHost.of(llm, "echo")) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        body = {**HELLO, "messages": [{"role": "user", "content": "x" * 8000}]}
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(post(CHAT, json.dumps(body).encode()))
            until(lambda: llm.status().running == 1)
        until(lambda: llm.status().idle, 10)
        settled(llm)


def test_keys_are_asked_for_everywhere_but_in_health():
    with serving(ModelHost.of(echo_llm(), "echo"), api_key="s3cret") as url:
        assert call(url, "/health")[0] == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s3cre"},
                        {"authorization": "Basic s3cret"}, {"authorization": "s3cret"}):
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                status, body = call(url, path, **headers)
                assert status == 401 and body["error"]["code"] == "invalid_api_key"
            assert call(url, CHAT, HELLO, **headers)[0] == 401
        assert call(url, CHAT, {**HELLO, "max_tokens": 2}, authorization="Bearer s3cret")[0] == 200


def test_other_machines_need_a_key():
    with pytest.raises(InvalidRequestError, match="API key"):
        ServerSettings(host="0.0.0.0")
    assert not ServerSettings(host="0.0.0.0", api_key="k").local
    assert ServerSettings(host="127.0.0.2").local and ServerSettings(host="::1").local
    done = subprocess.run([sys.executable, "-m", "edge_runtime.cli", "serve", "--host", "0.0.0.0"], text=True,
                          capture_output=True, env={**os.environ, "EDGE_RUNTIME_API_KEY": ""})
    assert done.returncode == 2 and "API key" in done.stderr and "Traceback" not in done.stderr


def test_names_and_origins():
    with serving(ModelHost.of(echo_llm(), "echo"), allowed_origins=("https://app.example",)) as url:
        assert call(url, "/v1/models", host="evil.example")[1]["error"]["code"] == "host_not_allowed"
        for name in ("localhost:9", "LocalHost:9", "[::1]:9"):
            assert call(url, "/v1/models", host=name)[0] == 200
        for name in ("[::1", "", "127.0.0.1.evil.example"):
            assert call(url, "/v1/models", host=name)[1]["error"]["code"] == "host_not_allowed"
        for origin in ("https://evil.example", "null", "http://[", "http://[::1", ""):
            assert call(url, "/v1/models", origin=origin)[1]["error"]["code"] == "origin_not_allowed", origin
        raw = b"OPTIONS " + CHAT.encode() + (b" HTTP/1.1\r\nhost: 127.0.0.1\r\norigin: %s\r\n"
                                             b"access-control-request-method: POST\r\n\r\n")
        allowed = exchange(url, raw % b"https://app.example")
        assert allowed.startswith(b"HTTP/1.1 204") and b"access-control-allow-origin: https://app.example" in allowed
        # OpenAI's client asks for headers of its own, which a browser then wants to see allowed by name.
        named = raw.replace(b"\r\n\r\n", b"\r\naccess-control-request-headers: authorization,x-stainless-os\r\n\r\n")
        assert b"access-control-allow-headers: authorization,x-stainless-os" in exchange(url, named % b"https://app.example")
        for origin in (b"https://evil.example", b"null", b"http://["):
            assert b"allow-origin" not in exchange(url, raw % origin)


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://App.example", "", "https://"])
def test_origins_that_no_browser_sends_are_refused(origin):
    with pytest.raises(InvalidRequestError, match="origin"):
        ServerSettings(allowed_origins=(origin,))
    for good in ("https://app.example", "http://[::1]:5173", "chrome-extension://abc", "null", "*"):
        ServerSettings(allowed_origins=(good,))


def test_a_client_that_leaves_does_not_wait_for_a_switch(tmp_path):
    files = [tmp_path / f"{name}.gguf" for name in ("first", "second")]
    for file in files:
        write_model(file, width=64)
    models = ModelHost(files, pulled=tuple, threads=1, memory_budget=2 << 30)
    models.load("first")
    with serving(models) as url:
        address = url.removeprefix("http://").split(":")
        bodies = [json.dumps({"model": name, "prompt": "x", "ignore_eos": True, "max_tokens": 3}).encode()
                  for name in ("second", "first")]
        models._leases += 1  # a request on the first that does not end
        connections = [socket.create_connection((address[0], int(address[1]))) for _ in bodies]
        for connection, body in zip(connections, bodies):
            connection.sendall(post("/v1/completions", body))
            until(lambda: models.switching)
        until(lambda: call(url, "/health")[1]["requests"] == 2)
        for connection in connections:
            connection.close()
        until(lambda: call(url, "/health")[1]["requests"] == 0, 20)
        assert models.switching and models.leases == 1, "the switch still waits"
        models._leases -= 1
        assert call(url, "/v1/completions", json.loads(bodies[0]))[0] == 200
        assert not models.leases


def test_too_many_at_once_are_told_so():
    llm = echo_llm(delay=0.02)
    with serving(ModelHost.of(llm, "echo"), max_requests=2) as url:
        threads = [threading.Thread(target=call, args=(url, CHAT, {**LONG, "max_tokens": 100})) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: llm.status().running == 2)
        status, body = call(url, CHAT, HELLO)
        assert status == 429 and body["error"]["code"] == "rate_limit_exceeded"
        assert call(url, "/health")[0] == 200
        for thread in threads:
            thread.join()


def test_a_fault_of_ours_in_a_stream_is_in_the_log(echo, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(chat, "token_logprobs", broken)
    body = {**HELLO, "stream": True, "max_tokens": 3, "logprobs": True}
    answer = exchange(echo[0], post(CHAT, json.dumps(body).encode(), "connection: close"))
    assert b'"code":"internal_error"' in answer and b"[DONE]" not in answer and "a fault of ours" in caplog.text
    settled(echo[1])


def test_a_device_that_fails_in_the_middle_of_a_stream():
    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("the device is gone")

    llm = echo_llm(fail=fail)
    with serving(ModelHost.of(llm, "echo")) as url:
        answer = exchange(url, post(CHAT, json.dumps({**LONG, "stream": True}).encode(), "connection: close"))
        assert answer.startswith(b"HTTP/1.1 200") and b'"code":"device_error"' in answer and b"[DONE]" not in answer
        assert call(url, CHAT, {**HELLO, "max_tokens": 3})[0] == 200


def test_metrics_count_what_happened(echo):
    url = echo[0]
    text = {"model": "echo", "messages": [{"role": "user", "content": "SAY:seven chars"}]}
    assert call(url, CHAT, text)[1]["choices"][0]["message"]["content"] == "seven chars"
    call(url, CHAT, {**text, "model": "other"})
    found = call(url, "/metrics")[1]["text"]
    values = dict(line.rsplit(" ", 1) for line in found.splitlines() if not line.startswith("#"))
    assert values['edge_requests_total{path="/v1/chat/completions",status="200"}'] == "1"
    assert values['edge_requests_total{path="/v1/chat/completions",status="404"}'] == "1"
    assert values["edge_completion_tokens_total"] == "11"
    assert values["edge_time_to_first_token_seconds_count"] == "1"
    assert values["edge_time_between_tokens_seconds_count"] == "10"
    assert values['edge_model_info{model="echo"}'] == "1" and int(values["edge_kv_pages_total"]) == 2000
    assert values["edge_queue_length"] == "0"
    buckets = [int(v) for k, v in values.items() if k.startswith("edge_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    for line in found.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{.+\})? [0-9.e+-]+", line), line


@pytest.mark.parametrize("stream, n", [(False, 1), (True, 1), (True, 2)])
def test_the_times_between_tokens_are_true_gaps(stream, n):
    def stall(step: int) -> None:
        if step == 5:
            time.sleep(0.6)  # a mean over the reply would make each of the ten gaps 0.06 s of it

    with serving(ModelHost.of(echo_llm(fail=stall), "echo")) as url:
        body = {"model": "echo", "messages": [{"role": "user", "content": "SAY:seven chars"}], "stream": stream, "n": n}
        answer = exchange(url, post(CHAT, json.dumps(body).encode(), "connection: close"))
        assert answer.startswith(b"HTTP/1.1 200")
        found = call(url, "/metrics")[1]["text"]
    name = "edge_time_between_tokens_seconds"
    values = {key: float(value) for key, value in re.findall(rf'^{name}_(\S+) (\S+)$', found, re.M)}
    assert values["count"] == 10 * n == values['bucket{le="+Inf"}']
    slow = values["count"] - values['bucket{le="0.5"}']
    assert 1 <= slow <= n, found  # the second reply may begin behind the pause
    assert values["sum"] >= 0.6 * slow


def test_sigterm_finishes_what_runs():
    with ServerProcess("--threads", "1", "--stream-interval", "0") as server:
        connection = socket.create_connection(server.address)
        body = {"model": "edge-tiny", "messages": [{"role": "user", "content": "Tell me."}], "stream": True,
                "ignore_eos": True, "max_tokens": 1900, "temperature": 2.0}  # a second or so: the signal comes first
        connection.sendall(post(CHAT, json.dumps(body).encode(), "connection: close"))
        answer = first_event(connection)
        ended = threading.Thread(target=lambda: server.terminate())
        ended.start()
        while part := connection.recv(65536):
            answer += part
        ended.join()
        assert b'"finish_reason":"length"' in answer and b"[DONE]" in answer
        assert "1 requests run" in server.errors and "stopped" in server.errors and "cut off" not in server.errors


def test_a_second_signal_ends_the_wait_and_says_what_it_cut_off():
    with ServerProcess("--threads", "1") as server:
        body = {"model": "edge-tiny", "prompt": "Tell", "ignore_eos": True, "max_tokens": 1900, "n": 64}
        with socket.create_connection(server.address) as connection:
            connection.sendall(post("/v1/completions", json.dumps(body).encode(), "connection: close"))
            until(lambda: call(server.url, "/health")[1]["engine"]["running"])
            server._process.send_signal(signal.SIGINT)
            until(lambda: "waiting up to" in server.errors)
            server._process.send_signal(signal.SIGINT)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            assert answer.startswith(b"HTTP/1.1 503") and b"server_shutdown" in answer
        assert server._process.wait(30) == 0
        until(lambda: "stopped" in server.errors)
        assert "1 requests were cut off" in server.errors


def test_sigterm_with_little_patience_says_what_it_cut_off():
    with ServerProcess("--threads", "1", "--grace", "0.2") as server:
        bodies = [{"model": "edge-tiny", "prompt": f"Tell {i}", "stream": stream, "ignore_eos": True,
                   "max_tokens": 1900} for i, stream in enumerate((True, False))]
        connections = [socket.create_connection(server.address) for _ in bodies]
        for connection, body in zip(connections, bodies):
            connection.sendall(post("/v1/completions", json.dumps(body).encode(), "connection: close"))
        first_event(connections[0])
        assert server.terminate() == 0
        answers = []
        for connection in connections:
            answer = b""
            while part := connection.recv(65536):
                answer += part
            answers.append(answer)
        assert b"server_shutdown" in answers[0] and b"[DONE]" not in answers[0]
        assert b"503" in answers[1][:20] and b"server_shutdown" in answers[1]
        assert "2 requests were cut off" in server.errors


def test_a_port_in_use_is_a_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run([sys.executable, "-m", "edge_runtime.cli", "serve", "--threads", "1", "--port",
                               str(taken.getsockname()[1])], text=True, capture_output=True)
        assert done.returncode == 2 and "port" in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_the_command_names_it():
    code = ("import sys; sys.modules['uvicorn'] = None\nfrom edge_runtime.cli import app\n"
            "app(['serve'])")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install 'edge-runtime[server]'" in done.stderr


def test_early_exits_over_http():
    with LLM(threads=1, exit_layers=[2]) as llm, serving(ModelHost.of(llm, "tiny")) as url:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}
        plain = call(url, CHAT, body)[1]
        status, early = call(url, CHAT, {**body, "early_exit": "verify"})
        assert status == 200, early
        assert early["choices"] == plain["choices"] and "early_exit" not in plain["edge_runtime"]
        found = early["edge_runtime"]["early_exit"]
        assert found["drafted"] >= found["accepted"] >= 0 and found["tokens_by_layer"]
        layer = {"missing_kv": "propagate", "criterion": "layer", "layer": 2}
        status, cut = call(url, CHAT, {**body, "early_exit": layer})
        assert status == 200 and set(cut["edge_runtime"]["early_exit"]["tokens_by_layer"]) == {"2"}
        status, refused = call(url, CHAT, {**body, "early_exit": {**layer, "layer": 1}})
        assert status == 400 and "early_exit" in refused["error"]["param"]
        streamed = exchange(url, post(CHAT, json.dumps({**body, "early_exit": "verify", "stream": True}).encode(),
                                      "connection: close"))
        text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                       for line in streamed.decode().splitlines() if line.startswith("data: {"))
        assert text == plain["choices"][0]["message"]["content"]


def test_a_huge_valid_body_does_not_hold_up_the_others():
    with serving(ModelHost.of(echo_llm(), "echo")) as url:
        body = json.dumps({"model": "echo", "prompt": [1] * 3_000_000}).encode()
        slow = threading.Thread(target=exchange, args=(url, post("/v1/completions", body)))
        slow.start()
        longest = 0.0
        while slow.is_alive():
            began = time.perf_counter()
            assert call(url, "/health")[0] == 200
            longest = max(longest, time.perf_counter() - began)
        assert longest < 2.0
        answer = exchange(url, post("/v1/completions", body))
        assert answer.startswith(b"HTTP/1.1 400") and b"context_length_exceeded" in answer
        assert call(url, "/v1/completions", {"model": "echo", "prompt": [97] * 3000, "max_tokens": 2})[0] == 200


def test_sixty_four_clients_get_each_their_own_answer():
    def ask(i: int) -> bool:
        said = f"answer {i} of {i * 7919}"
        body = {"model": "echo", "messages": [{"role": "user", "content": f"SAY:{said}"}], "stream": i % 2 == 0}
        if i % 2:
            return call(url, CHAT, body)[1]["choices"][0]["message"]["content"] == said
        answer = exchange(url, post(CHAT, json.dumps(body).encode(), "connection: close")).decode()
        assert "data: [DONE]" in answer
        return "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                       for line in answer.splitlines() if line.startswith("data: {")) == said

    llm = echo_llm()
    with serving(ModelHost.of(llm, "echo")) as url:
        with ThreadPoolExecutor(64) as pool:
            assert all(pool.map(ask, range(256)))
        settled(llm)
