"""From the command to the page: data folder, port, server thread, window or browser, the end."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.apps.chat import settings
from edge_runtime.apps.chat.errors import ChatDataError, DataInUseError
from edge_runtime.apps.chat.security import Gate
from edge_runtime.apps.chat.store import Store
from edge_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from edge_runtime.apps.model_host import ModelHost

SHUTDOWN_SECONDS = 2.0


@dataclass(frozen=True)
class Options:
    """data: folder of database and models; None: the user's. port: 0: the one of last time where it is free, so that
    what a browser keeps for this address stays, else any. window: True, False, or None: a window where pywebview is
    installed. open_page: False only prints the link. model: opened instead of the one of last time."""

    data: Path | None = None
    port: int = 0
    window: bool | None = None
    open_page: bool = True
    model: Path | None = None
    host_options: dict[str, Any] | None = None


def data_folder() -> Path:
    """EDGE_RUNTIME_DATA, else the system's place for a user's application data, with chat below it."""
    asked = os.environ.get("EDGE_RUNTIME_DATA")
    if asked:
        return Path(asked).expanduser() / "chat"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "edge-runtime" / "chat"


def run(options: Options, say: Callable[[str], None]) -> None:
    """Serve and show the chat until its window is closed or Ctrl-C. A second run on the same folder opens the first
    one's page instead. Raises DataInUseError where that cannot be, MissingExtraError, and what Store raises."""
    _check_server()
    window = _webview(options.window)
    folder = (options.data or data_folder()).expanduser().absolute()
    try:
        store = Store(folder)
    except DataInUseError as error:
        link = link_of_owner(getattr(error, "owner", {}))
        if link is None:
            raise
        say(f"the chat is running already: {link}")
        if options.open_page:
            webbrowser.open(link)
        return
    try:
        server = Server(store, _host(options), port=options.port, model_asked=options.model is not None)
    except BaseException:
        store.close()
        raise
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        link = server.start()
        say(f"chat: {link}\ndata: {folder}\nstop with Ctrl-C")
        if window is not None and options.open_page:
            window.settings["ALLOW_DOWNLOADS"] = True  # exports
            window.create_window("Edge Runtime", link, width=1100, height=800, min_size=(360, 480))
            window.start(private_mode=False, storage_path=str(folder / "window"))
        else:
            if options.open_page:
                threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
            server.wait()
    except KeyboardInterrupt:
        say("stopping: replies that are being written keep their text")
    finally:
        server.stop()


class Server:
    """uvicorn on a thread of its own, over a socket that is bound before the page is told its address."""

    def __init__(self, store: Store, host: ModelHost, *, port: int = 0, model_asked: bool = False):
        import uvicorn

        from edge_runtime.apps.chat.app import create_app

        self.socket = _bound(port, settings.get(store)["port"])
        self.port: int = self.socket.getsockname()[1]
        self.gate, self._store = Gate(self.port), store
        self.app = create_app(store, host, self.gate)
        if model_asked:
            self.app.state.chat.models.asked = host.default
        self._server = uvicorn.Server(uvicorn.Config(
            self.app, log_level="warning", access_log=False, lifespan="on", ws="none", server_header=False,
            timeout_graceful_shutdown=int(SHUTDOWN_SECONDS), timeout_keep_alive=30))
        self._thread = threading.Thread(target=self._serve, name="edge-runtime-chat", daemon=True)
        # Not Thread.join: interrupted by Ctrl-C it takes a running thread for ended before Python 3.13 (gh-90882).
        self._ended = threading.Event()

    def start(self) -> str:
        """Serve; returns a link that opens the page once. Connections wait in the socket from now on."""
        self._thread.start()
        with contextlib.suppress(ChatDataError):
            settings.put(self._store, {"port": self.port})
            self._store.lock.announce({"url": self.url, "secret": self.gate.launch_secret})
        return self.link()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def link(self) -> str:
        return f"{self.url}/open/{self.gate.code()}"

    def wait(self) -> None:
        """Until the server ends; Ctrl-C is raised here."""
        while not self._ended.wait(0.5):
            pass

    @property
    def running(self) -> bool:
        return self._thread.ident is not None and not self._ended.is_set()

    def stop(self) -> None:
        """End replies with their text kept, close model and database."""
        self.app.state.chat.hub.close()
        self._server.should_exit = True
        if self.running:
            self._ended.wait(SHUTDOWN_SECONDS + 15)

    def _serve(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self.socket]))
        finally:
            self._ended.set()


def _host(options: Options) -> ModelHost:
    """The models: the file that was named, or the name of a pulled one, before all others."""
    from edge_runtime.apps.model_host import ModelHost, pulled_models
    from edge_runtime.models import hub

    files, default = [], None
    if options.model is not None:
        if not options.model.exists() and hub.is_name(options.model.as_posix()):
            default = options.model.as_posix()
        else:
            files.append(options.model)
    return ModelHost(files, default=default, pulled=pulled_models, drain_seconds=5.0, **(options.host_options or {}))


def _bound(asked: int, last: int | None) -> socket.socket:
    """A listening socket on this machine's own address."""
    wanted = [asked] if asked else [*([last] if last else []), 0]
    for i, port in enumerate(wanted):
        # With its protocol, or asyncio does not set TCP_NODELAY, and pieces of a reply wait 40 ms for acknowledgements.
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name != "nt":  # there it would let two programs have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", port))
            found.listen(128)
            return found
        except OSError as error:
            found.close()
            if i == len(wanted) - 1:
                raise ChatDataError(f"port {port}: cannot be used ({error.strerror}). Leave --port out to take a free "
                                    f"one.") from error
    raise AssertionError


def _check_server() -> None:
    for package in ("starlette", "uvicorn"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "chat", "The chat") from error


def _webview(asked: bool | None) -> Any:
    """The module of pywebview where a window is wanted, or None. Raises MissingExtraError where it must be."""
    if asked is False:
        return None
    try:
        import webview
    except ImportError as error:
        if asked:
            raise MissingExtraError("pywebview", "desktop", "A window") from error
        return None
    return webview


def link_of_owner(owner: dict[str, Any]) -> str | None:
    """A link to the page of the process that owns the folder, or None where it does not answer."""
    url, secret = owner.get("url"), owner.get("secret")
    if not isinstance(url, str) or not isinstance(secret, str) or not url.startswith("http://127.0.0.1:"):
        return None
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=5)
    try:
        connection.request("POST", "/launch", headers={"X-Edge-Launch": secret})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        return str(found["url"]) if answer.status == 200 else None
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        return None
    finally:
        connection.close()
