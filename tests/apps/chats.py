"""A chat for tests: its server in a thread, over a model that says what it is told to, and a client with its cookie."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from edge_runtime.apps.chat.launcher import Server
from edge_runtime.apps.chat.store import Store
from edge_runtime.apps.model_host import ModelHost
from tests.apps.servers import echo_llm

PATIENCE = 60.0


class Client:
    """What the page would ask for; answers are parsed, and asserted to have the status that is expected."""

    def __init__(self, server: Server):
        self.server, self.origin = server, server.url
        self.http = httpx.Client(base_url=server.url, headers={"Origin": server.url}, timeout=PATIENCE)
        assert self.http.get(server.link(), follow_redirects=False).status_code == 303

    def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200, raw: bytes | None = None) -> Any:
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        found = self.http.request(method, f"/api/{path}", content=content)
        assert found.status_code == status, found.text
        return found.json() if "json" in found.headers.get("content-type", "") else found.text

    def send(self, text: str, conversation: int | None = None, parent: int | None = None, draft: str = "new") -> Any:
        return self("POST", "messages", {"conversation": conversation, "parent": parent, "text": text, "draft": draft})

    def message(self, conversation: int, message: int) -> dict[str, Any]:
        shown = self("GET", f"conversations/{conversation}")["messages"]
        return next(one for one in shown if one["id"] == message)

    def finished(self, conversation: int, message: int) -> dict[str, Any]:
        """The reply, once it is written."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.message(conversation, message))["status"] == "streaming":
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def ask(self, text: str, **where: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send, and wait for the reply: (what `messages` answered, the reply)."""
        sent = self.send(text, **where)
        return sent, self.finished(sent["conversation"], sent["reply"])


@contextlib.contextmanager
def chatting(folder: Path, **device: Any) -> Iterator[Client]:
    """A chat over `EchoDevice(**device)`: it says what stands behind SAY: in a message."""
    server = Server(Store(folder), ModelHost.of(echo_llm(**device), "echo"))
    server.start()
    client = Client(server)
    try:
        yield client
    finally:
        client.http.close()
        server.stop()
        assert not server.running


class Pace:
    """How fast a model is, given as `fail` to its device, which calls it before each step: `seconds` a step, and after
    `steps` of them none until `go_on`. What a test looks at in the middle of a reply is then not over before."""

    def __init__(self, steps: float = float("inf"), seconds: float = 0.0):
        self._steps, self._seconds, self._changed = steps, seconds, threading.Condition()

    def __call__(self, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: step < self._steps, PATIENCE), f"step {step} was never let go"
            seconds = self._seconds
        time.sleep(seconds)

    def go_on(self) -> None:
        with self._changed:
            self._steps, self._seconds = float("inf"), 0.0
            self._changed.notify_all()


class Listener:
    """The events that a page would get, collected in a thread."""

    def __init__(self, client: Client):
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.some = threading.Condition()
        self._client = client
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.wait(lambda name, data: name == "ready")

    def wait(self, wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        with self.some:
            while True:
                for name, data in self.events:
                    if wanted(name, data):
                        return data
                assert time.monotonic() < deadline, self.events[-5:]
                self.some.wait(0.5)

    def _listen(self) -> None:
        name = ""
        with contextlib.suppress(httpx.HTTPError), self._client.http.stream("GET", "/api/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    with self.some:
                        self.events.append((name, json.loads(line[6:])))
                        self.some.notify_all()
