"""Replies while they are written: one task each, told to the pages at once and saved ten times a second.

A reply belongs to the server, not to a page: closing or reloading the page does not end it. Whatever happens, what was
written is in the database within SAVE_SECONDS.
"""
from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from edge_runtime.apps.chat import attachments, conversations, tree
from edge_runtime.apps.chat.errors import ChatDataError
from edge_runtime.apps.chat.events import Hub
from edge_runtime.apps.chat.models import Models
from edge_runtime.apps.chat.prompts import messages_for_model
from edge_runtime.apps.chat.store import Store
from edge_runtime.apps.model_host import BUNDLED
from edge_runtime.errors import EngineStoppedError, InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.sampling import SamplingParams

SAVE_SECONDS = 0.1
STATUS = {"stop": "complete", "length": "length", "cancelled": "stopped", "error": "error"}


@dataclass
class Live:
    """A reply that is being written. text: all of it, what is continued included; units: its length in UTF-16, as
    JavaScript counts; pieces: how many deltas there were."""

    message: int
    conversation: int
    text: str
    units: int = 0
    pieces: int = 0
    saved: str | None = None
    stopping: bool = False
    generation: Any = None
    status: str = "streaming"
    error: str | None = None
    stats: dict[str, Any] | None = None
    model: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)


class Replies:
    """All replies that are being written. Its coroutines run on the hub's loop."""

    def __init__(self, store: Store, models: Models, hub: Hub):
        self._store, self._models, self._hub = store, models, hub
        self._live: dict[int, Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsaved: set[int] = set()

    def running(self) -> list[dict[str, int]]:
        return [{"message": one.message, "conversation": one.conversation} for one in self._live.values()]

    def overlaid(self, message: dict[str, Any]) -> dict[str, Any]:
        """A stored message with what its reply has come to meanwhile. It streams until its end is saved: a question
        that comes after it reads it from the database."""
        live = self._live.get(message["id"])
        if live is None:
            return message
        return {**message, "content": live.text, "status": "streaming", "error": None}

    def start(self, message: int, conversation: int, text: str = "") -> None:
        """Write the reply `message`, which is stored and "streaming"; text: what it has, to go on after."""
        live = Live(message, conversation, text, _units(text))
        self._live[message] = live
        task = asyncio.get_running_loop().create_task(self._write(live, bool(text)), name=f"reply {message}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self, message: int) -> None:
        """End a reply after the step that runs now; its text is kept. Returns when it is saved."""
        live = self._live.get(message)
        if live is None:
            return
        live.stopping = True
        if live.generation is not None:
            live.generation.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(live.ended.wait(), 10)

    async def stop_all(self, conversation: int | None = None) -> None:
        """Those of one conversation, or all: before a switch of models, a deletion, the end."""
        await asyncio.gather(*(self.stop(live.message) for live in list(self._live.values())
                               if conversation in (None, live.conversation)))

    async def _write(self, live: Live, go_on: bool) -> None:
        saver = asyncio.create_task(self._save_now_and_then(live))
        try:
            await self._generate(live, go_on)
        except asyncio.CancelledError:
            live.status = "interrupted"
            raise
        except EngineStoppedError as error:
            live.status, live.error = ("interrupted" if live.text else "error"), str(error)
        except Exception as error:
            live.status, live.error = "error", str(error) or type(error).__name__
        finally:
            saver.cancel()
            await self._save(live)
            while live.message in self._unsaved:  # a full disk: kept here until there is room
                await asyncio.sleep(1)
                await self._save(live)
            del self._live[live.message]
            live.ended.set()
            self._hub.publish("reply", {"message": live.message, "conversation": live.conversation,
                                        "status": live.status, "error": live.error, "stats": live.stats,
                                        "model": live.model, "content": live.text})
            self._tell_kv()

    async def _generate(self, live: Live, go_on: bool) -> None:
        host = self._models.host
        if host.llm is None and not host.switching:
            await self._models.load(self._models.remembered())
        if host.llm is None and self._models.state["state"] == "failed":
            raise InvalidRequestError("model", self._models.state["name"],
                                      f"one that opens. {self._models.state['error']} Choose a model, then regenerate")
        async with host.lease() as llm:
            live.model = host.current
            if live.stopping:
                live.status = "stopped"
                return
            messages, params = await asyncio.to_thread(self._prompt, live, go_on)
            template = {"continue_final_message": True} if go_on else None
            live.generation = await llm.achat(messages, params, stream=True, template=template)
            if live.stopping:
                live.generation.cancel()
            self._tell_kv()
            async for chunk in live.generation:
                if chunk.text:
                    self._tell(live, chunk.text)
                if chunk.finish_reason is not None:
                    live.status = STATUS[chunk.finish_reason]
                    live.stats = {**asdict(chunk.stats), "tokens_per_second": chunk.stats.tokens_per_second,
                                  "context": llm.context}

    def _prompt(self, live: Live, go_on: bool) -> tuple[list[dict[str, str]], SamplingParams]:
        """Messages and parameters; runs on a worker thread."""
        from edge_runtime.sampling import SamplingParams

        conversation = conversations.get(self._store, live.conversation)
        path = tree.path(self._store, live.message)
        if not go_on:
            path = path[:-1]
        texts = attachments.texts(self._store, [message["id"] for message in path])
        values = dict(conversation["sampling"])
        values.setdefault("max_tokens", None)
        return (messages_for_model(path, texts, conversation["system_prompt"], bundled_model=live.model == BUNDLED),
                SamplingParams.of(None, values))

    def _tell(self, live: Live, text: str) -> None:
        live.text += text
        self._hub.publish("delta", {"message": live.message, "conversation": live.conversation, "text": text,
                                    "start": live.units, "piece": live.pieces, "next": live.pieces + 1,
                                    "at": time.time()})
        live.units += _units(text)
        live.pieces += 1

    async def _save_now_and_then(self, live: Live) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            if live.saved != live.text:
                await asyncio.shield(self._save(live))
                self._tell_kv()

    async def _save(self, live: Live) -> None:
        """Where the disk is full the text stays here, the pages are told, and the next round tries again."""
        async with live.saving:  # one after the other: two threads could write the older text last
            text = live.text
            try:
                await asyncio.to_thread(tree.save, self._store, live.message, text, status=live.status,
                                        error=live.error, stats=live.stats, model=live.model)
            except ChatDataError as error:
                self._unsaved.add(live.message)
                self._hub.publish("trouble", {"message": f"A reply is not saved yet. {error}"})
                return
            live.saved = text
            if live.message in self._unsaved:
                self._unsaved.discard(live.message)
                self._hub.publish("trouble", {"message": ""})

    def _tell_kv(self) -> None:
        kv = self._models.kv()
        if kv is not None:
            self._hub.publish("kv", kv)


def _units(text: str) -> int:
    """Its length in UTF-16."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
