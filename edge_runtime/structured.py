"""Replies that must match a grammar: at every token, those that could not continue it are forbidden (llguidance)."""
from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.errors import InvalidRequestError, MissingExtraError
from edge_runtime.tokenizer import Tokenizer

KINDS = ("json_schema", "lark", "regex")
COMPILED = 64  # grammars kept compiled: the requests of one program mostly share theirs
# One space, or a new line and its indentation. Free whitespace lets a small model write nothing else until its end.
WHITESPACE = r"[ ]|\n[ \t]{0,32}"


@dataclass(frozen=True)
class Grammar:
    """What a reply must match, whole. kind: "json_schema", "lark" (llguidance's dialect) or "regex"; source: its text.
    lenient: keywords of a schema that cannot be enforced are left unchecked, rather than refused."""

    kind: str
    source: str
    lenient: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequestError("grammar.kind", self.kind, f"one of {', '.join(KINDS)}")
        if not isinstance(self.source, str):
            raise InvalidRequestError("grammar.source", self.source, "a string")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, *, lenient: bool = False) -> Grammar:
        """JSON that a schema allows (draft 2020-12, as far as llguidance enforces it); its text or its value."""
        if isinstance(schema, str):
            return cls("json_schema", schema, lenient)
        try:
            return cls("json_schema", json.dumps(schema), lenient)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError("grammar", schema, f"a schema made of JSON values ({error})") from error

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression (Rust's syntax) matches from its beginning to its end."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """Text of a context-free grammar in llguidance's variant of Lark."""
        return cls("lark", source)


class TokenMask:
    """One reply's way through a grammar. `apply` before a token is drawn, `advance` after it."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def apply(self, scores: np.ndarray) -> None:
        """Forbid, with -inf in float32 [V], what cannot continue the grammar. Raises `InvalidRequestError` where the
        grammar turns out too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._error()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        scores[:self._vocab_size][allowed == 0] = -np.inf
        scores[self._vocab_size:] = -np.inf

    def advance(self, token_id: int) -> None:
        """The token that was drawn."""
        if not self._matcher.consume_token(token_id):
            raise self._error()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: the reply is whole."""
        return bool(self._matcher.is_stopped())

    def _error(self) -> InvalidRequestError:
        return InvalidRequestError("grammar", _first_line(self._matcher.get_error()), "a grammar that can be followed")


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps those used last. Safe from many threads.

    vocab_size: of the logits; a model may pad its head beyond the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, min(vocab_size, tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> TokenMask:
        """A mask at the grammar's beginning. Raises `InvalidRequestError` for a grammar that is malformed, unsupported
        or cannot be met, `MissingExtraError` without llguidance."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compiled[grammar] = self._new(grammar)
                while len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return TokenMask(matcher.deep_copy(), self._vocab_size)

    def _new(self, grammar: Grammar) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingExtraError("llguidance", "structured", "A reply that must match a grammar") from error
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer, self._vocab_size)
        source = grammar.source
        try:
            if grammar.kind == "json_schema":
                source = LLMatcher.grammar_from_json_schema(source, overrides={
                    "whitespace_pattern": WHITESPACE, "lenient": grammar.lenient})
            elif grammar.kind == "regex":
                source = LLMatcher.grammar_from_regex(source)
            matcher = LLMatcher(self._vocabulary, source, log_level=0)
        except (ValueError, TypeError) as error:
            raise InvalidRequestError("grammar", grammar.source, f"well formed ({_first_line(str(error))})") from error
        if matcher.is_error():
            raise InvalidRequestError("grammar", grammar.source,
                                      f"one that can be met and enforced ({_first_line(matcher.get_error())})")
        return matcher


class _Tokens:
    """The vocabulary as llguidance asks for it: a token's bytes, which are special, and how bytes are encoded."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i in range(vocab_size) if tokenizer.is_special(i)]
        ends = sorted(i for i in tokenizer.eog_ids if i < vocab_size)
        if not ends:  # llguidance insists on an end token; this one lies behind the vocabulary and is never drawn
            ends = [vocab_size]
            self.tokens.append(b"<end>")
            self.special_token_ids.append(vocab_size)
        self.end_ids = ends
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special=False, start=False)


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = _Tokens(tokenizer, vocab_size)
    return LLTokenizer(TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=tokens.end_ids)


def _first_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."
