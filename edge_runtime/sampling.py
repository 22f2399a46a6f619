"""From one row of logits to a token: penalties, truncation, temperature, the draw."""
from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from edge_runtime.early_exit import EarlyExit
from edge_runtime.errors import InvalidRequestError, NumericalError
from edge_runtime.structured import Grammar, TokenMask

NUCLEUS = 2048  # tokens looked at first for top_p: sorting them costs a tenth of sorting 128k
MAX_LOGPROBS = 1000  # more is a dump of the distribution, which costs more than the model
MAX_STOP_CHARACTERS = 100_000  # 28 MB while they are looked for
MAX_BIAS = 1e30  # added to a logit; times the largest penalty it is still a float32
MAX_PENALTY = 1e9  # likewise, times a reply of any length


@dataclass(frozen=True)
class SamplingParams:
    """How a reply is drawn and when it ends.

    Transforms run in the order of llama.cpp's default chain: logit_bias, repetition_penalty, frequency and presence
    penalties, top_k, top_p, min_p, temperature, draw. (Hugging Face divides by the temperature before it truncates:
    there top_p keeps more at a high temperature.)

    max_tokens: most tokens of the reply; None: until the context is full.
    temperature: 0 is greedy (the lowest id among equals); the default is 0.7.
    top_k: keep the k likeliest; 0 is off. top_p: then the fewest likeliest that hold this share; 1 is off, 0.95 the
        default. min_p: then those at least min_p as likely as the likeliest; 0 is off.
    repetition_penalty: logits of tokens seen in prompt or reply are divided (multiplied when negative) by it; 1 is
        off (CTRL, arXiv:1909.05858). presence_penalty, frequency_penalty: subtracted from the logits of tokens in the
        reply, once and per occurrence (OpenAI's definitions); 0 is off.
    logit_bias: token id -> added to its logit, at most 1e30; -inf forbids it.
    seed: the same seed gives the same text whatever else runs; None draws one.
    stop: string or strings that end the reply, 100,000 characters in all at most; they are not part of it.
        stop_token_ids: tokens likewise.
    ignore_eos: go on after the model's own end tokens.
    grammar: None, or what the whole reply must match, such as Grammar.json_schema({...}) (extra `structured`).
    early_exit: None for the model's own setting (`LLM(early_exit=...)`), False for none, or how tokens may leave the
        network early: an `EarlyExit`, or "verify", "recompute", "propagate".
    logprobs: None, or report the log-probability of each token and of the n likeliest, under the model's own
        distribution, before any transform.
    """

    max_tokens: int | None = 512
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    early_exit: EarlyExit | str | Mapping[str, Any] | bool | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, "a whole number from 0 up, or None")
        _number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "a finite number from 0 up")
        _integer("top_k", self.top_k, 0, "a whole number from 0 (off) up")
        _number("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1 (off)")
        _number("min_p", self.min_p, lambda v: 0 <= v <= 1, "from 0 (off) to 1")
        _number("repetition_penalty", self.repetition_penalty, lambda v: 0.01 <= v <= 100,
                "from 0.01 to 100; 1 is off")  # beyond that, logits leave float32
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), lambda v: -MAX_PENALTY <= v <= MAX_PENALTY,
                    f"from -{MAX_PENALTY:g} to {MAX_PENALTY:g}; 0 is off")
        if self.seed is not None:
            _integer("seed", self.seed, None, "a whole number or None")
            object.__setattr__(self, "seed", int(self.seed))  # random takes no integers of NumPy
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, f"a whole number from 0 to {MAX_LOGPROBS}, or None", MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise InvalidRequestError("ignore_eos", self.ignore_eos, "True or False")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequestError("grammar", self.grammar, "a Grammar or None")
        if self.early_exit is True:
            raise InvalidRequestError("early_exit", True, "an EarlyExit, its name, False or None")
        if self.early_exit is not False:
            object.__setattr__(self, "early_exit", EarlyExit.of(self.early_exit))
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        stops = tuple(stops) if isinstance(stops, Iterable) else (() if stops is None else (stops,))
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise InvalidRequestError("stop", self.stop, "a string or strings, none of them empty")
        if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
            raise InvalidRequestError("stop", f"{sum(map(len, stops))} characters",
                                      f"at most {MAX_STOP_CHARACTERS} characters, all strings together")
        object.__setattr__(self, "stop", stops)
        ids = (self.stop_token_ids,) if isinstance(self.stop_token_ids, int) else self.stop_token_ids
        if not isinstance(ids, Iterable):
            raise InvalidRequestError("stop_token_ids", ids, "token ids")
        ids = tuple(ids)
        for token in ids:
            _integer("stop_token_ids", token, 0, "token ids, whole numbers from 0 up")
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in ids))
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError("logit_bias", self.logit_bias, "a mapping from token id to a number")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, "keyed by token ids, whole numbers from 0 up")
            _number("logit_bias", bias, lambda v: v <= MAX_BIAS, f"numbers up to {MAX_BIAS:g}; -inf forbids the token")

    @classmethod
    def of(cls, params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """`params` (None: the defaults) with some values changed. Raises `InvalidRequestError` on unknown names."""
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequestError("params", params, "a SamplingParams or None")
        known = {f.name for f in fields(cls)}
        for name in overrides:
            if name not in known:
                raise InvalidRequestError("sampling parameter", name, f"one of {', '.join(sorted(known))}")
        return replace(params or cls(), **overrides)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidRequestError` where a token id lies outside the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= vocab_size:
                    raise InvalidRequestError(name, token, f"token ids below the vocabulary size of {vocab_size}")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, and the likeliest tokens beside it as (id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one reply. Its random numbers depend on the seed and on how many tokens it drew, on nothing
    else."""

    def __init__(self, params: SamplingParams, prompt_ids: np.ndarray, mask: TokenMask | None = None):
        self.params, self.mask = params, mask
        self._random = random.Random(params.seed) if params.temperature > 0 else None
        self._counts: dict[int, int] = {}  # of the reply
        self._seen = set(np.unique(prompt_ids).tolist()) if params.repetition_penalty != 1 else set()
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter((-math.inf if bias < -MAX_BIAS else bias for bias in params.logit_bias.values()),
                                 np.float32)
        self._counting = bool(params.presence_penalty or params.frequency_penalty)
        self._plain = not (len(self._bias_ids) or self._counting or params.repetition_penalty != 1 or mask)

    def sample(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """The next token from float32 [V], which is left as it is. Raises `NumericalError` on NaN or infinity."""
        best = int(logits.argmax())  # NumPy's argmax stops at a NaN
        if not (math.isfinite(logits[best]) and math.isfinite(logits.min())):
            raise NumericalError(f"The model produced {_count_bad(logits)} logits that are NaN or infinite among "
                                 f"{logits.size}. The request ends; check the model file.")
        if self._plain:
            scores = logits
        else:
            scores = self._penalized(logits)
            best = int(scores.argmax())
            if scores[best] == -math.inf:
                raise InvalidRequestError("logit_bias", -math.inf, "such that at least one token stays possible")
        token = best if self._random is None else self._draw(scores, best, self._random.random())
        if self._counting:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.params.repetition_penalty != 1:
            self._seen.add(token)
        if self.mask is not None:
            self.mask.advance(token)
        return token, None if self.params.logprobs is None else _logprob(logits, token, self.params.logprobs)

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        scores = logits.copy()
        if len(self._bias_ids):
            scores[self._bias_ids] += self._bias
        if self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = scores[ids], np.float32(self.params.repetition_penalty)
            scores[ids] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            scores[ids] -= counts * self.params.frequency_penalty + np.float32(self.params.presence_penalty)
        if self.mask is not None:
            self.mask.apply(scores)
        return scores

    def _draw(self, scores: np.ndarray, best: int, uniform: float) -> int:
        """Token at `uniform` in [0, 1) of the truncated distribution, candidates in the order of their ids."""
        params, peak = self.params, scores[best]
        ids: np.ndarray | None = None  # None: the whole vocabulary
        if 0 < params.top_k < scores.size:
            ids = _top_k(scores, params.top_k)
        if params.top_p < 1:
            ids = _top_p(scores if ids is None else scores[ids], peak, params.top_p, ids)
        if params.min_p > 0:
            kept = (scores if ids is None else scores[ids]) >= peak + np.float32(math.log(params.min_p))
            ids = np.flatnonzero(kept) if ids is None else ids[kept]
        left = scores if ids is None else scores[ids]
        with np.errstate(over="ignore"):  # at a tiny temperature all but the likeliest go to exp(-inf)
            weights = np.exp((left - peak) * np.float32(1 / max(params.temperature, 1e-30)))
        index = _Cumulative(weights).position(share=uniform)
        return index if ids is None else int(ids[index])


class _Cumulative:
    """Finds where the running sum of float32 weights passes a share of their total, block by block: NumPy's cumsum
    over a whole vocabulary takes as long as the rest of the sampler together."""

    BLOCK = 512

    def __init__(self, weights: np.ndarray):
        self._weights = weights
        starts = np.arange(0, weights.size, self.BLOCK)
        self._sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
        self.total = float(self._sums[-1])

    def position(self, share: float) -> int:
        """Index of the first weight with which the running sum exceeds `share` of the total, 0 <= share < 1."""
        target = share * self.total
        block = min(int(np.searchsorted(self._sums, target, side="right")), len(self._sums) - 1)
        start = block * self.BLOCK
        inside = np.cumsum(self._weights[start:start + self.BLOCK], dtype=np.float64)
        if block:
            inside += self._sums[block - 1]
        return start + min(int(np.searchsorted(inside, target, side="right")), len(inside) - 1)


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k highest, ascending; among equals at the border the lower ids."""
    border = np.partition(scores, scores.size - k)[scores.size - k]
    above = np.flatnonzero(scores > border)
    if len(above) == k:
        return above
    return np.sort(np.concatenate([above, np.flatnonzero(scores == border)[:k - len(above)]]))


def _top_p(scores: np.ndarray, peak: np.float32, top_p: float, ids: np.ndarray | None) -> np.ndarray:
    """Ids of the fewest likeliest tokens that hold at least `top_p`, ascending; `scores` are those of `ids`."""
    weights = np.exp(scores - peak)
    enough = top_p * float(weights.sum())
    # Most nuclei are small: sort the head first, all only where the head does not hold enough.
    for size in (NUCLEUS, weights.size):
        head = weights if size >= weights.size else np.partition(weights, weights.size - size)[-size:]
        running = _Cumulative(np.sort(head)[::-1])
        if running.total >= enough:
            break
    count = running.position(share=min(enough / running.total, 1.0)) + 1
    border = np.partition(head, head.size - count)[head.size - count]
    chosen = np.flatnonzero(weights >= border)
    if len(chosen) > count:  # of equals at the border the lower ids
        equal = np.flatnonzero(weights[chosen] == border)
        chosen = np.delete(chosen, equal[len(equal) - (len(chosen) - count):])
    return chosen if ids is None else ids[chosen]


def _logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    peak = logits.max()
    log_total = float(peak) + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = _top_k(logits, min(count, logits.size)) if count < logits.size else np.arange(logits.size)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        top = tuple((int(i), float(logits[i]) - log_total) for i in ids)
    return TokenLogprob(token, float(logits[token]) - log_total, top)


def _count_bad(logits: np.ndarray) -> int:
    return int(logits.size - np.isfinite(logits).sum())


def _integer(name: str, value: Any, low: int | None, limit: str, high: int | None = None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        raise InvalidRequestError(name, value, limit)


def _number(name: str, value: Any, allowed: Any, limit: str) -> None:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not allowed(value):
        raise InvalidRequestError(name, value, limit)
