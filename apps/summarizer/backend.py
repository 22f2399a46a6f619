"""Who answers: a model in this process."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.errors import CancelledError, ChatTemplateError, InvalidRequestError
from edge_runtime.outcome import Stats

if TYPE_CHECKING:
    from edge_runtime.llm import LLM
    from edge_runtime.status import EngineStatus

Tick = Callable[[int], None]
# What every Stats had first; whatever else it tells (exits, modes) is shown as it is named.
COUNTED = {"prompt_tokens", "cached_tokens", "completion_tokens", "queued", "ttft", "seconds"}
SCORE_TOKENS = 1024  # of one scored stretch: enough to know what came before, and short enough to run beside others


class Backend(Protocol):
    """context: tokens of prompt and reply; slots: requests that run at once; model: its name; identity: names what
    its answers depend on; bundled: it is the model that ships with the package, which knows one prompt."""

    context: int
    slots: int
    model: str
    identity: str
    bundled: bool

    def count(self, text: str) -> int:
        """Tokens of a text alone."""
        ...

    def overhead(self, prompt: str) -> int:
        """Tokens of a request that asks `prompt`."""
        ...

    def units(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each, for "score"."""
        ...

    def ask(self, ask: Ask, stop: threading.Event, tick: Tick) -> Answer:
        """The answer, on the caller's thread, of which there are `slots` and more. tick: told of tokens as they come.
        Raises EdgeRuntimeError, CancelledError once `stop` is set."""
        ...

    def close(self) -> None: ...


class LocalBackend:
    """An `LLM` of this process; its engine makes one batch of what many threads ask."""

    def __init__(self, llm: LLM):
        self.llm, self.context = llm, llm.context
        self.slots = llm.plan.max_batch if llm.plan is not None else llm.engine.max_batch
        self.model = (llm.config.name if llm.config is not None else "") or "edge-runtime"
        kv, device = (llm.plan.kv, llm.plan.device) if llm.plan is not None else ("", "")
        early = "" if llm.early_exit is None else repr(llm.early_exit)
        self.identity = " ".join(filter(None, (self.model, llm.fingerprint, kv, device, early)))
        self.bundled = self.model == "Edge Tiny"
        self._templated = True

    def count(self, text: str) -> int:
        return len(self.llm.tokenize(text, add_special=False))

    def overhead(self, prompt: str) -> int:
        try:
            return int(self.llm.chat(prompt, max_tokens=0).stats.prompt_tokens)
        except ChatTemplateError:
            self._templated = False
            return len(self._plain(prompt))

    def units(self, sentences: Sequence[str]) -> list[list[int]]:
        return [self.llm.tokenize(sentence, add_special=False) for sentence in sentences]

    def ask(self, ask: Ask, stop: threading.Event, tick: Tick) -> Answer:
        if stop.is_set():
            raise CancelledError("cancelled")
        began, before = time.perf_counter(), self.llm.status()
        if ask.kind == "score":
            return self._score(ask.content, began)
        if ask.kind == "embed":
            return self._embed(ask.content, began)
        if ask.kind == "post":
            raise InvalidRequestError("kind", ask.kind, "answered by a server")
        if ask.kind == "chat" and (self._templated or ask.tools):
            stream = self.llm.chat(list(ask.content), ask.params, stream=True, priority="batch",
                                   tools=list(ask.tools) if ask.tools else None)
        elif ask.kind == "chat":
            stream = self.llm.stream(self._plain("\n\n".join(m["content"] for m in ask.content)), ask.params,
                                     priority="batch")
        else:
            stream = self.llm.stream(ask.content, ask.params, priority="batch")
        with stream:
            for chunk in stream:
                tick(len(chunk.token_ids))
                if stop.is_set():
                    raise CancelledError("cancelled")
        reply = stream.reply
        assert reply is not None
        stats: Stats = reply.stats
        return Answer(reply.text, reply.finish_reason, stats.prompt_tokens, stats.completion_tokens,
                      stats.cached_tokens, time.perf_counter() - began, logprobs=self._logprobs(reply),
                      extra={**_extra(stats), "mode": self._modes(before)})

    def close(self) -> None:
        """The LLM is the caller's."""

    def _modes(self, before: EngineStatus) -> Any:
        """How the answer was computed: of a hybrid device, the laps of each mode that it took part in or waited for."""
        now = self.llm.status()
        if now.placement is None or before.placement is None:
            return now.mode
        return {mode: laps - before.placement.modes.get(mode, 0) for mode, laps in now.placement.modes.items()
                if laps > before.placement.modes.get(mode, 0)}

    def _score(self, units: Sequence[Sequence[int]], began: float) -> Answer:
        first = self.llm.tokenize("", add_special=True)
        ids = [*first, *(token for unit in units for token in unit)]
        scores = -self.llm.score([ids], priority="batch")[0][len(first):]
        values, at = [], 0
        for unit in units:
            known = scores[at:at + len(unit)]
            known = known[~np.isnan(known)]  # the very first token, where the model puts no BOS before it
            values.append([float(known.sum()), len(known)])
            at += len(unit)
        return Answer(prompt_tokens=len(ids), seconds=time.perf_counter() - began, values=values)

    def _embed(self, content: Any, began: float) -> Answer:
        vector = self.llm.embed([content], priority="batch")[0]
        tokens = len(self.llm.tokenize(content)) if isinstance(content, str) else len(content)
        return Answer(prompt_tokens=tokens, seconds=time.perf_counter() - began,
                      values=[float(value) for value in vector])

    def _plain(self, text: str) -> list[int]:
        """A document's names of special tokens are text, not tokens."""
        return self.llm.tokenize(text, add_special=True, parse_special=False)

    def _logprobs(self, reply: Any) -> Any:
        """OpenAI's list, of what `TokenLogprob` holds."""
        if reply.logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.llm.detokenize([token], skip_special=False)
            return {"token": text, "logprob": round(float(logprob), 6), "bytes": list(text.encode())}

        return [{**entry(one.token_id, one.logprob), "top_logprobs": [entry(*top) for top in one.top]}
                for one in reply.logprobs]


def _extra(stats: Stats) -> Mapping[str, Any]:
    """Names and values that JSON holds, without those that say nothing."""
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(stats) if field.name not in COUNTED):
        value = getattr(stats, name)
        if value:
            found[name] = {str(key): count for key, count in value.items()} if isinstance(value, Mapping) else value
    return found


assert {field.name for field in fields(Stats)} >= COUNTED
