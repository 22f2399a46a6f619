"""What comes back from a request: chunks while it runs, a reply at its end."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.sampling import TokenLogprob

FINISH_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Stats:
    """Counts of tokens and times in seconds of one request.

    prompt_tokens: of the prompt. cached_tokens: of these, found computed already. completion_tokens: tokens of the
    reply, the end token not counted. queued: submission to first step. ttft: submission to first token.
    seconds: submission to end.

    With early exit: exits: layers run before the exit -> tokens that left there (the model's layers: a full pass; the
    reply's first token belongs to its prompt and is not counted; an accepted draft counts at the exit that drafted it).
    layers_run: layers computed, summed over the rows of decoded tokens, drafts, checks and states that came along
    later. drafted, accepted: drafts made and found right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queued: float = 0.0
    ttft: float = 0.0
    seconds: float = 0.0
    exits: Mapping[int, int] = field(default_factory=dict)
    layers_run: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def layers_per_token(self) -> float:
        """The mean layer at which a token left; 0 without early exit."""
        tokens = sum(self.exits.values())
        return sum(layer * count for layer, count in self.exits.items()) / tokens if tokens else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafts that were right; 0 where none was made."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the reply after its first token; 0 where there was no second."""
        decode = self.seconds - self.ttft
        return (self.completion_tokens - 1) / decode if self.completion_tokens > 1 and decode > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of the part of the prompt that was computed, from first step to first token."""
        prefill = self.ttft - self.queued
        return (self.prompt_tokens - self.cached_tokens) / prefill if prefill > 0 else 0.0


@dataclass(frozen=True)
class Reply:
    """text: without the stop string; token_ids: every token drawn but the end token; finish_reason: "stop" (end token
    or stop string), "length" (max_tokens or the context), "cancelled" or "error"; logprobs: one per token, where
    asked; error: what ended it, where finish_reason is "error" (only in lists: a single request raises);
    token_times: when each token was drawn, seconds from submission."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    stats: Stats = Stats()
    error: EdgeRuntimeError | None = None
    token_times: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply. Texts, token_ids, logprobs and token_times of all chunks joined are the reply's.
    finish_reason and stats are None but in the last one."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    stats: Stats | None = None
    token_times: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return self.text
