"""A server process: uvicorn around the app, from the listening socket to the last request's end."""
from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from edge_runtime.apps.server.settings import ServerSettings
from edge_runtime.errors import InvalidRequestError, MissingExtraError

if TYPE_CHECKING:
    from edge_runtime.apps.model_host import ModelHost

SWITCH_SECONDS = 0.0002  # how long the event loop may keep the engine's thread from Python once a step is computed
LAST_WORDS_SECONDS = 5.0  # for answers that are cut off at the end of the grace period

Say = Callable[[str], object]


def check_installed() -> None:
    """Raise MissingExtraError where the extra `server` is not installed."""
    for package in ("starlette", "uvicorn", "orjson"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "server", "The server") from error


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket. Raises InvalidRequestError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named by its protocol: asyncio sets TCP_NODELAY on connections of such sockets alone, and without it the second
    # piece of an answer waits for the client's delayed acknowledgement, 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # there it would let a second server take the same port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host.strip("[]"), settings.port))
        found.listen(1024)
    except OSError as error:
        found.close()
        raise InvalidRequestError("port", f"{settings.host}:{settings.port}",
                                  f"an address of this machine that is free ({error.strerror or error}); port 0 takes "
                                  f"any free one") from error
    found.setblocking(False)
    return found


def serve(host: ModelHost, settings: ServerSettings, *, say: Say = lambda _: None,
          ready: Callable[[str], object] = lambda _: None, log_level: str = "warning", access_log: bool = False) -> int:
    """Serve until SIGINT or SIGTERM; `ready` gets the URL once requests are taken. What runs then gets
    `grace_seconds` to end; after that it ends with an error that says so. Returns how many requests were cut off."""
    check_installed()
    import uvicorn

    from edge_runtime.apps.server.app import create_app

    app = create_app(host, settings)
    state = app.state.server
    listener = listen(settings)
    address = listener.getsockname()
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    cut = 0

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Uvicorn's own raises the signal again at its end, which would end the process before its last words."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready(f"http://{name}:{address[1]}")

        async def shutdown(self, sockets: Any = None) -> None:
            nonlocal cut
            state.closing = True
            if state.running:
                say(f"shutting down: {len(state.running)} requests run, waiting up to {settings.grace_seconds:g} s")
            timer = asyncio.ensure_future(self._grace())
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()
            cut = max(cut, state.cancel_running())  # some still run where a second signal has ended the wait

        async def _grace(self) -> None:
            nonlocal cut
            await asyncio.sleep(settings.grace_seconds)
            cut = state.cancel_running()
            await asyncio.sleep(LAST_WORDS_SECONDS)
            self.force_exit = True

    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(app, log_level=log_level, access_log=access_log, lifespan="off", server_header=False,
                            timeout_keep_alive=30, timeout_graceful_shutdown=None)
    try:
        Server(config).run(sockets=[listener])
    finally:
        listener.close()
    if cut:
        say(f"{cut} requests were cut off")
    return cut
