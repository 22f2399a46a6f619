"""Servers for tests: a process of its own with the bundled model, and one in a thread over a device that says what the
test wants said."""
from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_runtime.apps.model_host import ModelHost
from edge_runtime.apps.server.app import create_app
from edge_runtime.apps.server.settings import ServerSettings
from edge_runtime.chat_template import ChatTemplate
from edge_runtime.llm import LLM
from edge_runtime.loading import LoadedModel
from tests.fake_device import EOS, FakeDevice, byte_tokenizer

PATIENCE = 120.0  # seconds for a server to come up on a machine that is busy with other things
TOOLS_TEMPLATE = ChatTemplate(
    "{% if tools %}Tools, called as <tool_call>: {% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}")


class EchoDevice(FakeDevice):
    """Says what stands behind the last "SAY:" of its prompt, up to the end of that message, and ends."""

    def logits(self, history: np.ndarray) -> np.ndarray:
        text = bytes(int(token) if token < 256 else 0 for token in history)
        out = super().logits(history)
        prompt, mark, said = text.rpartition(b"[assistant] ")
        if mark and b"SAY:" in prompt:
            script = prompt.rpartition(b"SAY:")[2].split(b"\0")[0]
            out[:] = -30
            out[script[len(said)] if len(said) < len(script) else EOS] = 30
        return out


def echo_llm(context: int = 4096, **device) -> LLM:
    """An LLM that says what it is told to, with a template that knows tools."""
    fake = EchoDevice(**device)
    return LLM.from_loaded(LoadedModel(
        fake, byte_tokenizer(), context, 2000 * fake.kv_layout.page_bytes, 32,  # type: ignore[arg-type]
        chat_template=TOOLS_TEMPLATE, fingerprint=lambda: "echo"))


@contextlib.contextmanager
def serving(host: ModelHost, **settings) -> Iterator[str]:
    """The URL of a server in a thread of this process."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    app = create_app(host, ServerSettings(port=listener.getsockname()[1], **settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        host.close()


class ServerProcess:
    """`edge-runtime serve --port 0` with further options, until the `with` ends. `errors` is what it said."""

    def __init__(self, *options: str, **environment: str):
        command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
                                         env={**os.environ, **environment})
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(r"at (http://\S+)/v1", self.errors)):
            assert self._process.poll() is None and time.monotonic() < deadline, self.errors
            time.sleep(0.02)
        self.url = found.group(1)
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.address = (host, int(port))

    @property
    def errors(self) -> str:
        return "".join(self._lines)

    def terminate(self, patience: float = 60) -> int:
        """SIGTERM, and its exit code."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(patience)
        self._reader.join(5)
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
