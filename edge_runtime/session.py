"""A conversation that keeps its KV computed: append, ask, fork, save, load."""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime import session_file
from edge_runtime.arguments import begins_text, checked_variables
from edge_runtime.chat_template import checked_messages
from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.page_table import PageTable
from edge_runtime.outcome import Reply
from edge_runtime.request import Conversation
from edge_runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from edge_runtime.llm import LLM


class Session:
    """Either a chat (`chat`, with `messages`) or running text (`append`, `generate`), whose tokens stay computed
    between requests. One request at a time; other sessions and requests of the LLM go on beside it.

    When memory is short the KV of idle sessions is given up and computed again from the tokens at the next request:
    slower, the same session.

    messages: the chat so far, dicts with role and content; empty for running text. A request raises
    InvalidRequestError while a reply of this session is still being written, and EngineStoppedError once the LLM is
    closed.
    """

    def __init__(self, llm: LLM):
        self._llm = llm
        self._conversation = Conversation()
        self._busy = threading.Lock()
        self._settling = False  # a reply was dropped: the engine may still have to put its tokens here
        self._running_text = False  # what no chat can go on from
        self.messages: list[dict[str, Any]] = []

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, special ones too."""
        return self._conversation.tokens.tolist()

    @property
    def text(self) -> str:
        """All tokens so far as text, special ones left out."""
        return self._llm.detokenize(self.token_ids)

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._conversation.tokens)

    # Running text

    def append(self, text: str | Sequence[int]) -> None:
        """Add text (or token ids) and compute its KV now. Raises as `LLM.generate` does; then nothing was added."""
        self._run(lambda: self._extended(text), SamplingParams(max_tokens=0), on_end=self._becomes_text)

    def generate(self, text: str | Sequence[int] = "", params: SamplingParams | None = None, *, stream: bool = False,
                 **overrides: Any) -> Any:
        """Add text, if any, and continue: a Reply, or a `Generation` where `stream`. The reply becomes part of the
        session."""
        one = SamplingParams.of(params, overrides)
        return self._run(lambda: self._extended(text), one, stream=stream, on_end=self._becomes_text)

    # Chat

    def chat(self, messages: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
             params: SamplingParams | None = None, *, stream: bool = False,
             tools: Sequence[Mapping[str, Any]] | None = None, template: Mapping[str, Any] | None = None,
             **overrides: Any) -> Any:
        """Add messages (or the text of one from the user) and reply: a Reply, or a `Generation` where `stream`. A
        reply that ended by itself or by length joins `messages`; after an error or a cancellation they are as
        before, and so is what the next chat is told."""
        one = SamplingParams.of(params, overrides)
        template = checked_variables(template)
        if isinstance(messages, str):
            messages = {"role": "user", "content": messages}
        new = checked_messages([messages] if isinstance(messages, Mapping) else messages)
        conversation: list[dict[str, Any]] = []
        fresh = begins_text(template)

        def rendered() -> np.ndarray:
            if self._running_text and len(self):
                raise InvalidRequestError("session", "running text", "a chat from its first message on")
            self._running_text = False
            conversation.extend([*self.messages, *new])
            return self._llm._chat_ids(conversation, tools, template)

        def keep(reply: Reply | None) -> None:
            if reply is not None and reply.finish_reason in ("stop", "length"):
                self.messages = ([*conversation, {"role": "assistant", "content": reply.text}] if fresh
                                 else [*conversation[:-1], _continued(conversation[-1], reply.text)])

        return self._run(rendered, one, stream=stream, fresh=fresh, on_end=keep)

    # Copies

    def fork(self) -> Session:
        """Another session with the same past. Both share the KV until one writes: a fork costs no memory at first."""
        twin = Session(self._llm)
        with self._exclusive():
            def copy() -> PageTable | None:
                table, cache = self._conversation.table, self._llm.engine.cache
                if table is None or not cache.owns(table):
                    return None
                forked = table.fork()
                forked.truncate(min(forked.length, len(self._conversation.tokens)))
                cache.park(forked)
                return forked

            twin._conversation = Conversation(self._conversation.tokens.copy(), self._llm.engine.call(copy))
            twin.messages, twin._running_text = [dict(m) for m in self.messages], self._running_text
        return twin

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; a chat becomes running text thereby. Raises InvalidRequestError for a
        length that is negative or beyond the session's."""
        if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= len(self):
            raise InvalidRequestError("length", length, f"a whole number from 0 to {len(self)}")
        with self._exclusive():
            self._conversation.tokens = self._conversation.tokens[:length].copy()
            self.messages, self._running_text = [], True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, messages and KV to a file, atomically. OSError where the disk refuses."""
        engine = self._llm.engine
        with self._exclusive():
            tokens, messages = self._conversation.tokens, self.messages

            def hold() -> PageTable:
                # A fork of its own: its pages can be read here while the engine runs, for whoever writes copies first.
                cache, table = engine.cache, self._conversation.table
                if table is None or not cache.owns(table):
                    return cache.table()
                held = table.fork()
                held.truncate(min(held.length, len(tokens)))
                return held

            held = engine.call(hold)
        try:
            header = session_file.Header(self._llm._loaded.fingerprint(), held.pool.layout, len(tokens), held.length,
                                         None if self._running_text else messages)
            session_file.write(path, header, tokens, (held.pool.view(page) for page in held.pages))
        finally:
            engine.call(lambda: held.release())

    @classmethod
    def load(cls, llm: LLM, path: str | os.PathLike[str]) -> Session:
        """A session that `save` wrote. Raises SessionFileError where the file is corrupt or of another model."""
        session, engine = cls(llm), llm.engine
        layout = llm._loaded.device.kv_layout
        with session_file.Reader(path, layout, llm._loaded.fingerprint(), llm._loaded.device.vocab_size) as reader:
            header = reader.header

            def room() -> PageTable:
                table = engine.cache.table()
                table.reserve(header.length)
                return table

            table = engine.call(room)
            try:
                reader.read_pages(lambda index: table.pool.view(table.pages[index]))
            except BaseException:
                engine.call(table.release)
                raise

        def settle() -> None:
            table.advance(header.length)
            if engine.cache.owns(table):
                engine.cache.park(table)

        engine.call(settle)
        session._conversation = Conversation(reader.tokens, table)
        session.messages, session._running_text = header.messages or [], header.messages is None
        return session

    def close(self) -> None:
        """Give the KV back. The session may be used again: it computes its tokens anew."""
        with self._exclusive():
            table, self._conversation.table = self._conversation.table, None
            if table is not None and self._llm.engine.running:
                def release() -> None:
                    cache = self._llm.engine.cache
                    if cache.owns(table):
                        cache.unpark(table)
                        table.release()

                self._llm.engine.call(release)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _extended(self, text: str | Sequence[int]) -> np.ndarray:
        """The session's tokens and new ones; BOS only before the first."""
        old = self._conversation.tokens
        if not len(old):
            return self._llm._prompt_ids(text, "text")
        if isinstance(text, str):
            new: Any = self._llm.tokenizer.encode(text, add_special=False, parse_special=True)
        else:
            new = self._llm._prompt_ids(text, "text")
        return np.concatenate([old, np.asarray(new, np.int32)])

    def _becomes_text(self, reply: Reply | None) -> None:
        if reply is not None:
            self.messages = []
        self._running_text = not self.messages

    def _run(self, prompt: Callable[[], np.ndarray], params: SamplingParams, *, stream: bool = False,
             fresh: bool = False, on_end: Callable[[Reply | None], None] = lambda reply: None) -> Any:
        """One request on this session, from taking it to the end of the reply, which may be long after the return
        where `stream`."""
        self._take()

        def end(reply: Reply | None) -> None:
            self._settling = reply is None
            on_end(reply)
            self._busy.release()

        try:
            ids = prompt()
            if stream:
                return self._llm._stream(ids, params, fresh=fresh, on_end=end, conversation=self._conversation)
            reply = self._llm._reply(ids, params, fresh=fresh, conversation=self._conversation)
        except BaseException:
            end(None)
            raise
        end(reply)
        return reply

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise InvalidRequestError("session", "busy", "idle: its last reply is still being written. Read it to the "
                                                         "end or cancel it, or use a fork")
        if self._settling and self._llm.engine.running:
            self._llm.engine.call(lambda: None)  # commands run in order
        self._settling = False

    def _exclusive(self) -> _Exclusive:
        return _Exclusive(self)


def _continued(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A message that was broken off, with what the reply added to it."""
    content = message.get("content") or ""
    added = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return {**message, "content": added}


class _Exclusive:
    def __init__(self, session: Session):
        self._session = session

    def __enter__(self) -> None:
        self._session._take()

    def __exit__(self, *_: object) -> None:
        self._session._busy.release()
