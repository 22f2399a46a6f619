"""From a document to a summary: whole, in parts that are summarized again, or part after part.

A job is a generator: it yields lists of asks, is sent their answers, and returns the result. It knows nothing of
threads, ledgers or servers, and asks the same again when it is run again: answers that are kept make it short.
"""
from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.backend import Backend
from edge_runtime.apps.summarizer.chunks import split_text
from edge_runtime.apps.summarizer.prompts import Prompts, Shape, fill
from edge_runtime.apps.summarizer.selection import compressed, extracted, scored
from edge_runtime.errors import ContextLengthError, InvalidRequestError
from edge_runtime.sampling import SamplingParams

Job = Generator[list[Ask], list[Answer], dict[str, Any]]
STRATEGIES = ("auto", "whole", "map-reduce", "refine", "extractive")
# A document's tokens are counted alone; beside the prompt's they may merge otherwise, a token or two at each border.
BORDER_TOKENS = 8
ROUNDS = 8  # of summaries of summaries; each makes the text several times shorter, or says that it does not


@dataclass(frozen=True)
class Options:
    """strategy: one of STRATEGIES ("auto": whole where it fits, else map-reduce). compress: the share of a document's
    tokens that is kept before it is read, 1: all. chunk_tokens: most tokens of a document per request; None: what the
    context leaves."""

    strategy: str = "auto"
    compress: float = 1.0
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InvalidRequestError("strategy", self.strategy, f"one of {', '.join(STRATEGIES)}")
        if isinstance(self.compress, bool) or not 0 < self.compress <= 1:
            raise InvalidRequestError("compress", self.compress, "above 0 and at most 1, the share that is kept")


@dataclass
class Tally:
    """What the requests of one document took."""

    prompt: int = 0
    completion: int = 0
    complete: bool = True
    chunks: int = 0
    parts: list[str] = field(default_factory=list)

    def add(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.prompt += answer.prompt_tokens
            self.completion += answer.completion_tokens
            self.complete &= answer.finish_reason == "stop"


class Documents:
    """Makes jobs of texts. Raises InvalidRequestError where prompt and reply leave no room for a document."""

    def __init__(self, backend: Backend, prompts: Prompts, params: SamplingParams, options: Options):
        self.backend, self.prompts, self.params, self.options = backend, prompts, params, options
        if not params.max_tokens:
            raise InvalidRequestError("max_tokens", params.max_tokens, "a whole number from 1 up")
        room = self._room(prompts.map, prompts.reduce)
        if options.strategy == "refine":
            room = min(room, self._room(prompts.refine) - params.max_tokens)
        if room < 1 and options.strategy != "extractive":
            raise InvalidRequestError("max_tokens", params.max_tokens,
                                      f"smaller, or the context larger: of {backend.context} tokens of context, prompt "
                                      f"and reply leave none for a document")
        if options.chunk_tokens is not None and not 1 <= options.chunk_tokens <= room:
            raise InvalidRequestError("chunk_tokens", options.chunk_tokens,
                                      f"from 1 to {room}, what the context leaves")
        self.chunk_tokens = options.chunk_tokens or room

    def job(self, text: str) -> Job:
        """A text's: returns {"text", "strategy", "chunks", "parts", "complete", "prompt_tokens",
        "completion_tokens"}."""
        tally = Tally()
        if self.options.strategy == "extractive":
            sentences, answers = yield from scored(text, self.backend)
            tally.add(answers)
            tally.chunks = len(answers)
            return _result(extracted(sentences, self._shape), "extractive", tally)
        if self.options.compress < 1:
            sentences, answers = yield from scored(text, self.backend)
            tally.add(answers)
            text = compressed(sentences, self.options.compress)
        pieces = self._pieces(text)
        tally.chunks = len(pieces)
        strategy = "whole" if len(pieces) == 1 else self.options.strategy
        if strategy == "whole" and len(pieces) > 1:
            raise ContextLengthError(self.backend.count(text), self.chunk_tokens)
        if strategy == "refine":
            said = yield from self._refine(pieces, tally)
        else:
            strategy = "whole" if len(pieces) == 1 else "map-reduce"
            said = yield from self._map_reduce(pieces, tally)
        return _result(self.prompts.shape.applied(said), strategy, tally)

    @property
    def _shape(self) -> Shape:
        return self.prompts.shape

    def _map_reduce(self, pieces: list[str], tally: Tally) -> Generator[list[Ask], list[Answer], str]:
        texts, parts = pieces, pieces
        for level in range(ROUNDS):
            prompt = self.prompts.map if level == 0 else self.prompts.reduce
            answers = yield [self._ask(fill(prompt, text.strip("\n")), level, i) for i, text in enumerate(texts)]
            tally.add(answers)
            parts = [answer.text.strip() for answer in answers]
            if level == 0 and len(parts) > 1:
                tally.parts = parts
            if len(parts) == 1:
                break
            texts = self._pieces("\n\n".join(part for part in parts if part) or " ")
            if not texts or len(texts) >= len(parts):
                break  # the model repeats instead of summarizing: its parts are the summary
        return "\n\n".join(part for part in parts if part)

    def _refine(self, pieces: list[str], tally: Tally) -> Generator[list[Ask], list[Answer], str]:
        said = ""
        for i, piece in enumerate(pieces):
            text = piece.strip("\n")
            asked = fill(self.prompts.refine, text, said) if said else fill(self.prompts.map, text)
            answers = yield [self._ask(asked, 0, i)]
            tally.add(answers)
            said = answers[0].text.strip() or said
        return said

    def _ask(self, prompt: str, level: int, chunk: int) -> Ask:
        return Ask("chat", [{"role": "user", "content": prompt}], self.params, level, chunk)

    def _pieces(self, text: str) -> list[str]:
        return split_text(text, self.chunk_tokens, self.backend.count)

    def _room(self, *prompts: str) -> int:
        overhead = max(self.backend.overhead(fill(prompt, "")) for prompt in prompts)
        return self.backend.context - overhead - (self.params.max_tokens or 0) - BORDER_TOKENS


def _result(text: str, strategy: str, tally: Tally) -> dict[str, Any]:
    return {"text": text, "strategy": strategy, "chunks": tally.chunks, "parts": tally.parts,
            "complete": tally.complete, "prompt_tokens": tally.prompt, "completion_tokens": tally.completion}
