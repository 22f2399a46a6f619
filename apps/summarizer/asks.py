"""One request of a model and its answer, as the ledger keeps them."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import blake2b
from typing import Any

from edge_runtime.sampling import SamplingParams

KINDS = ("chat", "complete", "embed", "score", "post")


@dataclass(frozen=True)
class Ask:
    """kind and content: "chat": messages, dicts with role and content; "complete": a prompt, text or token ids;
    "embed": a text or token ids; "score": units, a list of lists of token ids that follow each other; "post": (path,
    body) of an OpenAI-compatible server. tools: for chats. level: 0 for a document's own chunks, 1 and up for
    summaries of summaries. chunk: its number in the level."""

    kind: str
    content: Any
    params: SamplingParams | None = None
    level: int = 0
    chunk: int = 0
    tools: tuple[Mapping[str, Any], ...] | None = None

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name what is asked: whoever asks it again gets the same answer."""
        params = {one.name: getattr(self.params, one.name) for one in fields(self.params)} if self.params else None
        told = json.dumps([self.kind, self.content, params, self.tools], sort_keys=True, default=_plain)
        return blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Answer:
    """text: of a reply; finish_reason as `Reply`'s; values: a vector, or for a score [self-information in nats, tokens]
    of each unit; logprobs: OpenAI's "content" list, where asked; body: a server's own answer; extra: what the engine
    says of the request beyond its token counts; seconds: from its sending to its end."""

    text: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    values: Any = None
    logprobs: Any = None
    body: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in vars(self).items() if value not in (None, {}, 0, "")},
                          default=str)

    @classmethod
    def from_json(cls, text: str) -> Answer:
        return cls(**json.loads(text))


def _plain(value: Any) -> Any:
    """What JSON has no word for: mappings and sequences of other types, and objects that say what they are."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple | set | frozenset) else repr(value)
