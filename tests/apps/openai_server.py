"""A small OpenAI-compatible server of the standard library, whose answers follow from the question."""
from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer:
    """fail: called with the request's number; an HTTP status to answer with, "drop" to cut the connection, or None."""

    def __init__(self, fail: Callable[[int], int | str | None] = lambda number: None, delay: float = 0.0):
        self.fail, self.delay = fail, delay
        self.requests: list[dict] = []
        self.running = self.most = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {"object": "list", "data": [{"id": "fake-model", "max_model_len": 700}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append({"path": self.path, "body": body,
                                           "key": self.headers.get("Authorization")})
                    outer.running += 1
                    outer.most = max(outer.most, outer.running)
                try:
                    time.sleep(outer.delay)
                    wrong = outer.fail(number)
                    if wrong == "drop":
                        self.close_connection = True
                        return
                    if wrong is not None:
                        self.answer(int(wrong), {"error": {"message": f"played {wrong}"}})
                        return
                    self.answer(200, reply(self.path, body))
                finally:
                    with outer._lock:
                        outer.running -= 1

            def answer(self, status: int, body: dict) -> None:
                raw = json.dumps(body).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def said(text: str) -> str:
    """What the server answers to a prompt."""
    return "sum " + blake2b(text.encode(), digest_size=4).hexdigest()


def reply(path: str, body: dict) -> dict:
    if path.endswith("/chat/completions"):
        text = said(body["messages"][-1]["content"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    else:
        choice = {"index": 0, "text": said(body["prompt"]), "finish_reason": "stop"}
    return {"object": "chat.completion", "model": body["model"], "choices": [choice],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}


@contextlib.contextmanager
def serving(count: int = 1, **options: Any) -> Iterator[list[FakeServer]]:
    servers = [FakeServer(**options) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
