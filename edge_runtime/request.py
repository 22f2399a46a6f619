"""One request inside the engine: what was asked, what was drawn so far, and where the outcome goes."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edge_runtime.early_exit import ExitPlan
from edge_runtime.errors import EdgeRuntimeError, NumericalError
from edge_runtime.offload.page_table import PageTable
from edge_runtime.outcome import Chunk, Reply, Stats
from edge_runtime.sampling import Sampler, SamplingParams, TokenLogprob
from edge_runtime.sequence import Priority, Sequence, Wants
from edge_runtime.stops import StopMatcher
from edge_runtime.structured import TokenMask


class StreamDecoder(Protocol):
    """Token ids in, text out, never half a character."""

    def add(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


Outcome = Chunk | Reply | np.ndarray | BaseException
Sink = Callable[["Request", Outcome], None]  # called by the engine's thread: must be quick and must not raise


@dataclass
class Conversation:
    """Tokens whose KV a session keeps between its requests. `table` may lose its pages while idle, or belong to a
    cache that is gone: then it is computed again from `tokens`."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    table: PageTable | None = None


@dataclass(eq=False)
class Request:
    """prompt_ids: int32 [n], the whole context, a session's tokens included. embed: None, or "mean" or "last"
    pooling of the final hidden states instead of a reply. score: the prompt's own log-probabilities instead.
    streaming: chunks are wanted as they come."""

    prompt_ids: np.ndarray
    params: SamplingParams
    sink: Sink
    decoder: StreamDecoder | None = None
    priority: Priority = Priority.INTERACTIVE
    streaming: bool = False
    embed: str | None = None
    score: bool = False
    conversation: Conversation | None = None
    index: int = 0  # the caller's own number for it
    mask: TokenMask | None = None  # of params.grammar
    interval: float = 0.0  # seconds between two chunks at least
    exit: ExitPlan | None = None  # of params.early_exit

    sequence: Sequence | None = None
    cancelled: bool = False
    finished: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params, self.prompt_ids, self.mask)
        self.stops = StopMatcher(self.params.stop)
        self.limit = 0  # tokens of the reply at most, set by the engine
        self.token_ids: list[int] = []
        self.token_times: list[float] = []  # seconds from submission
        self.logprobs: list[TokenLogprob] = []
        self.texts: list[str] = []
        self.hidden: np.ndarray | None = None  # float64 [width], pooled so far
        self.scores = np.full(len(self.prompt_ids) if self.score else 0, np.nan, np.float32)
        self._sent = 0  # tokens that chunks have carried
        self._due = 0.0  # when the next chunk may go out

    @property
    def wants(self) -> Wants:
        if self.embed is not None:
            return Wants.HIDDEN
        if self.score:
            return Wants.SCORE
        return Wants.KV if self.params.max_tokens == 0 else Wants.TOKEN

    def draw(self, logits: np.ndarray, end_ids: frozenset[int]) -> str | None:
        """Take the next token from float32 [V]; returns the reason to end, or None."""
        token, logprob = self.sampler.sample(logits)
        now = time.perf_counter()
        if not self.first_token:
            self.first_token = now
        if (token in end_ids and (self.mask or not self.params.ignore_eos)) or token in self.params.stop_token_ids:
            self._emit(self._rest())
            return "stop"
        self.token_ids.append(token)
        self.token_times.append(now - self.submitted)
        if logprob is not None:
            self.logprobs.append(logprob)
        assert self.sequence is not None and self.decoder is not None
        self.sequence.append(token)
        text = self.stops.push(self.decoder.add(token))
        if self.stops.stop is not None:
            self._emit(text)
            return "stop"
        complete = self.mask is not None and self.mask.complete
        if complete or len(self.token_ids) >= self.limit:
            self._emit(text + self._rest())
            return "stop" if complete or self.stops.stop is not None else "length"
        self._emit(text)
        return None

    def pool(self, hidden: np.ndarray) -> None:
        """float32 [n, width]: the states of the next n tokens."""
        if not np.isfinite(hidden).all():
            raise NumericalError("The model produced hidden states that are NaN or infinite. The request ends.")
        last = hidden[-1].astype(np.float64)
        if self.embed == "mean":
            total = hidden.sum(axis=0, dtype=np.float64)
            self.hidden = total if self.hidden is None else self.hidden + total
        else:
            self.hidden = last

    def score_tokens(self, logits: np.ndarray, start: int) -> None:
        """float32 [n, V]: the logits after the tokens from `start` on."""
        targets = self.prompt_ids[start + 1:start + 1 + len(logits)]
        for i, (row, target) in enumerate(zip(logits, targets)):
            top = row.max()
            if not np.isfinite(top):
                raise NumericalError("The model produced logits that are NaN or infinite. The request ends.")
            self.scores[start + 1 + i] = row[target] - top - np.log(np.exp(row - top).sum())

    def finish(self, reason: str) -> None:
        """Send the last outcome: a vector for an embedding, a chunk where streaming, else the reply."""
        if self.embed is not None and reason == "stop":
            assert self.hidden is not None
            mean = self.hidden / len(self.prompt_ids) if self.embed == "mean" else self.hidden
            self.send(mean.astype(np.float32))
        elif self.score and reason == "stop":
            self.send(self.scores)
        elif self.streaming:
            self.send(self._chunk("".join(self.texts), reason))
        else:
            self.send(self.reply(reason))

    def reply(self, reason: str, error: EdgeRuntimeError | None = None) -> Reply:
        """All that was drawn so far, where not streaming."""
        logprobs = None if self.params.logprobs is None else tuple(self.logprobs)
        return Reply("".join(self.texts), tuple(self.token_ids), reason, logprobs, self.stats(), error,
                     tuple(self.token_times))

    def fail(self, error: BaseException) -> None:
        """Send the error, and before it the text that was drawn."""
        if self.streaming and self.texts and not self.finished:
            self.sink(self, self._chunk("".join(self.texts), None))
            self.texts.clear()
        self.send(error)

    def send(self, outcome: Outcome) -> None:
        """The final outcome, once."""
        if not self.finished:
            self.finished = True
            self.sink(self, outcome)

    def stats(self) -> Stats:
        now = time.perf_counter()
        started = self.started or now
        return Stats(
            prompt_tokens=len(self.prompt_ids), cached_tokens=self.sequence.cached_tokens if self.sequence else 0,
            completion_tokens=len(self.token_ids), queued=started - self.submitted,
            ttft=(self.first_token or now) - self.submitted, seconds=now - self.submitted, **self._exits())

    def _exits(self) -> dict[str, Any]:
        state = self.sequence.exit if self.sequence is not None else None
        if state is None:
            return {}
        stats = state.stats
        return dict(exits=dict(sorted(stats.layers.items())), layers_run=stats.layers_run, drafted=stats.drafted,
                    accepted=stats.accepted)

    def _rest(self) -> str:
        """What decoder and stop matcher still hold, at the end."""
        assert self.decoder is not None
        text = self.stops.push(self.decoder.flush())
        return text + self.stops.flush()

    def _emit(self, text: str) -> None:
        if text:
            self.texts.append(text)

    def emit_chunk(self) -> None:
        """Send the text that has come since the last chunk, where there is some, and not more often than `interval`:
        a small model makes tokens faster than chunks can be handled. All requests' chunks are due together."""
        if self.streaming and self.texts:
            if self.interval:
                now = time.perf_counter()
                if now < self._due:
                    return
                self._due = (now // self.interval + 1) * self.interval
            self.sink(self, self._chunk("".join(self.texts), None))
            self.texts.clear()

    def _chunk(self, text: str, reason: str | None) -> Chunk:
        fresh = slice(self._sent, len(self.token_ids))
        self._sent = len(self.token_ids)
        logprobs = None if self.params.logprobs is None else tuple(self.logprobs[fresh])
        return Chunk(text, tuple(self.token_ids[fresh]), reason, logprobs, self.stats() if reason else None,
                     tuple(self.token_times[fresh]))
