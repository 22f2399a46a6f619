"""From the command to the page: a window, ports, a second start, what is missing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

import httpx
import pytest

pytest.importorskip("starlette")

from edge_runtime.apps.chat import launcher
from edge_runtime.apps.chat.errors import ChatDataError, DataInUseError
from edge_runtime.apps.chat.launcher import Options
from edge_runtime.apps.chat.store import Store
from edge_runtime.errors import MissingExtraError, ModelNotFoundError
from tests.apps.chats import chatting


class Window:
    """Stands in for pywebview: opens the link as its page would."""

    def __init__(self) -> None:
        self.settings: dict[str, bool] = {}
        self.seen: list[int] = []
        self.while_open = lambda: None

    def create_window(self, title: str, link: str, **_: object) -> None:
        self.link = link

    def start(self, **_: object) -> None:
        with httpx.Client(follow_redirects=True) as page:
            self.seen.append(page.get(self.link).status_code)
            self.seen.append(page.get(self.link.split("/open/")[0] + "/api/start").status_code)
        self.while_open()


@pytest.fixture
def window(monkeypatch) -> Window:
    found = Window()
    monkeypatch.setitem(sys.modules, "webview", found)  # type: ignore[arg-type]
    return found


def test_a_window_opens_the_link_and_its_end_is_the_end(window, tmp_path):
    said: list[str] = []
    launcher.run(Options(data=tmp_path), said.append)
    assert window.seen == [200, 200] and window.settings["ALLOW_DOWNLOADS"]
    assert any(str(tmp_path) in line for line in said)
    Store(tmp_path).close()  # the lock is free again
    with pytest.raises(httpx.ConnectError):
        httpx.get(window.link)


def test_the_port_of_last_time_is_taken_again_where_it_is_free(window, tmp_path):
    links = []
    for _ in range(2):
        launcher.run(Options(data=tmp_path), lambda _: None)
        links.append(window.link.split("/open/")[0])
    assert links[0] == links[1]
    with socket.create_server(("127.0.0.1", int(links[0].rpartition(":")[2]))):
        launcher.run(Options(data=tmp_path), lambda _: None)
    assert window.link.split("/open/")[0] != links[0]


def test_a_port_that_is_taken_is_said(window, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ChatDataError, match="Leave --port out"):
        launcher.run(Options(data=tmp_path, port=other.getsockname()[1]), lambda _: None)
    Store(tmp_path).close()


def test_a_second_start_gets_a_link_of_the_first(window, tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(launcher.webbrowser, "open", opened.append)
    window.while_open = lambda: launcher.run(Options(data=tmp_path), lambda _: None)
    launcher.run(Options(data=tmp_path), lambda _: None)
    assert len(opened) == 1 and opened[0].startswith(window.link.split("/open/")[0]) and opened[0] != window.link


def test_an_owner_that_does_not_answer_is_said(window, tmp_path):
    store = Store(tmp_path)
    store.lock.announce({"url": "http://127.0.0.1:9", "secret": "s"})
    with pytest.raises(DataInUseError, match="another edge-runtime chat"):
        launcher.run(Options(data=tmp_path), lambda _: None)
    store.close()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webview", None)
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[desktop\]"):
        launcher.run(Options(data=tmp_path, window=True), lambda _: None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[chat\]"):
        launcher.run(Options(data=tmp_path), lambda _: None)


def test_a_model_that_is_not_there_is_said_before_anything_opens(window, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        launcher.run(Options(data=tmp_path, model=tmp_path / "none.gguf"), lambda _: None)
    Store(tmp_path).close()
    assert not window.seen


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path))
    assert launcher.data_folder() == tmp_path / "chat"
    monkeypatch.delenv("EDGE_RUNTIME_DATA")
    assert launcher.data_folder().parts[-2:] == ("edge-runtime", "chat")


@pytest.mark.skipif(os.name == "nt", reason="pthread_kill")
def test_an_interrupted_wait_still_waits_for_the_end(tmp_path):
    with chatting(tmp_path, delay=0.02) as client:
        sent = client.send("SAY:" + "word " * 100)
        while not client.message(sent["conversation"], sent["reply"])["content"]:
            time.sleep(0.01)
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.server.wait()
        assert client.server.running
        client.http.close()
        client.server.stop()
        assert not client.server.running
    store = Store(tmp_path)
    reply = store.row("SELECT status, content FROM messages WHERE id = ?", sent["reply"])
    store.close()
    assert reply is not None and reply["status"] == "stopped" and reply["content"].startswith("w")
