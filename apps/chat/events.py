"""What happens, told to every open page: a hub that pages subscribe to, and its events as server-sent events.

The hub belongs to one asyncio loop; `publish` may be called from any thread.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

PING_SECONDS = 10.0  # how soon a page notices that the server is gone, and the server that a page is
MAX_WAITING = 20_000  # events that a page may be behind before it is told to start over

Event = tuple[str, dict[str, Any]]


class Hub:
    """Events for all pages, in order."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pages: set[_Page] = set()
        self.closed = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def publish(self, name: str, data: dict[str, Any]) -> None:
        """From the loop's own thread the event is queued at once, from others as soon as the loop comes round."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            self._put((name, data))
        else:
            loop.call_soon_threadsafe(self._put, (name, data))

    def _put(self, event: Event) -> None:
        for page in self._pages:
            page.put(event)

    async def stream(self, first: Callable[[], list[Event]]) -> AsyncIterator[bytes]:
        """Server-sent events for one page: what `first` says as the page is taken in, then all that happens, until the
        hub closes."""
        page = _Page()
        self._pages.add(page)
        try:
            yield encode(first())
            while not self.closed:
                try:
                    waiting = await asyncio.wait_for(page.take(), PING_SECONDS)
                except asyncio.TimeoutError:
                    yield b": ping\n\n"
                    continue
                if page.overrun:
                    return  # the page connects again and asks for everything
                yield encode(joined(waiting))
        finally:
            self._pages.discard(page)

    def close(self) -> None:
        """End all streams; from any thread."""
        self.closed = True
        self.publish("bye", {})

    @property
    def pages(self) -> int:
        return len(self._pages)


class _Page:
    """Events that one page has not been sent yet."""

    def __init__(self) -> None:
        self._waiting: list[Event] = []
        self._some = asyncio.Event()
        self.overrun = False

    def put(self, event: Event) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self.overrun = True
            self._waiting.clear()
        self._waiting.append(event)
        self._some.set()

    async def take(self) -> list[Event]:
        await self._some.wait()
        self._some.clear()
        waiting, self._waiting = self._waiting, []
        return waiting


def joined(events: list[Event]) -> list[Event]:
    """The same with neighbouring pieces of one reply made one: a fast model writes a thousand a second."""
    out: list[Event] = []
    for name, data in events:
        if name == "delta" and out and out[-1][0] == "delta" and out[-1][1]["message"] == data["message"]:
            before = out[-1][1]
            out[-1] = ("delta", {**before, "text": before["text"] + data["text"], "next": data["next"]})
        else:
            out.append((name, data))
    return out


def encode(events: list[Event]) -> bytes:
    return "".join(f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
                   for name, data in events).encode("utf-8", "replace")
