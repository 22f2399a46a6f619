"""Pieces of a stream leave at once: asyncio turns Nagle's algorithm off for connections of our listening sockets."""
from __future__ import annotations

import asyncio
import socket

import pytest

pytest.importorskip("uvicorn")

from edge_runtime.apps.chat.launcher import _bound
from edge_runtime.apps.server.serving import listen
from edge_runtime.apps.server.settings import ServerSettings


@pytest.mark.parametrize("listener", [lambda: listen(ServerSettings(port=0)), lambda: _bound(0, None)],
                         ids=["server", "chat"])
def test_accepted_connections_do_not_wait_for_acknowledgements(listener):
    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Peer(asyncio.Protocol):
            def connection_made(self, transport):
                sock = transport.get_extra_info("socket")
                found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        sock = listener()
        server = await asyncio.get_running_loop().create_server(Peer, sock=sock)
        async with server:
            _, writer = await asyncio.open_connection(*sock.getsockname()[:2])
            try:
                return await asyncio.wait_for(found, 10)
            finally:
                writer.close()

    assert asyncio.run(accepted()) != 0
