"""Thresholds of early exit that keep a promise: found by Learn-then-Test on a text, stored, and found again.

The promise: with probability `confidence` over the draw of the calibration sequences, the expected share of a
sequence's decoded tokens that differ from the full model's, given the same tokens before them, is at most `risk`.
Sequences are to be drawn as those that will be decoded are: of the same kind, independently.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime import __version__
from edge_runtime.calibration_store import (
    CALIBRATED_CRITERIA,
    CALIBRATED_MISSING_KV,
    Calibration,
    check_writable,
    find,
    folder,
    load,
    read,
    save,
    write_json,
)
from edge_runtime.early_exit import EarlyExit
from edge_runtime.errors import CalibrationError, InvalidRequestError, NotEnoughTextError
from edge_runtime.exit_path import Limits, near, safest_to_fastest
from edge_runtime.exit_trace import Advance, Decoded, ExitTrace, Replay, exits_of
from edge_runtime.risk_control import BOUNDS, Tested, certify_in_sequence, least_sequences

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

__all__ = ["CALIBRATED_CRITERIA", "CALIBRATED_MISSING_KV", "Calibrated", "Calibration", "Measured", "Promise",
           "calibrate", "check_enough", "check_writable", "find", "folder", "load", "measure", "read", "save",
           "write_json"]

LEAST_RISK = 1e-5  # 300,000 sequences at a confidence of 0.95
REPLAYED_SHARES = (0.0, 0.05, 0.2, 0.4, 0.7, 1.0)  # of the risk, that candidates for replays of their own aim at


@dataclass(frozen=True)
class Promise:
    """What calibration is asked for. bound: "betting" or "hoeffding_bentkus", see `risk_control`. tuning: share of the
    sequences that order the candidates and are not tested. seed: of the sequences' shuffle."""

    risk: float = 0.05
    confidence: float = 0.95
    criterion: str = "max_prob"
    missing_kv: str = "recompute"
    bound: str = "betting"
    tuning: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("risk", 0, 1), ("confidence", 0, 1), ("tuning", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise InvalidRequestError(name, value, f"above {low} and below {high}")
        if self.risk < LEAST_RISK:
            raise InvalidRequestError("risk", self.risk, f"at least {LEAST_RISK:g}: less takes millions of sequences")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidRequestError("seed", self.seed, "a whole number from 0 up")
        if self.criterion not in CALIBRATED_CRITERIA:
            raise InvalidRequestError("criterion", self.criterion, f"one of {', '.join(CALIBRATED_CRITERIA)}")
        if self.missing_kv not in CALIBRATED_MISSING_KV:
            raise InvalidRequestError(
                "missing_kv", self.missing_kv, " or ".join(CALIBRATED_MISSING_KV)
                + ("; verify needs no calibration: it gives the full model's tokens" if self.missing_kv == "verify"
                   else ""))
        if self.bound not in BOUNDS:
            raise InvalidRequestError("bound", self.bound, f"one of {', '.join(BOUNDS)}")

    @property
    def delta(self) -> float:
        return 1 - self.confidence

    @property
    def least(self) -> int:
        """Sequences that it takes, tuning share included, when no token differs."""
        tested = least_sequences(self.risk, self.delta, self.bound)
        total = math.ceil(tested / (1 - self.tuning))
        while total - _tuning(total, self.tuning) < tested:
            total += 1
        return total


@dataclass(frozen=True)
class Measured:
    """What limits do on sequences. risk: mean share of a sequence's tokens that differ; tokens: share of all tokens;
    layers_per_token: mean layer at which tokens leave; leaving: exit layer (or all layers) -> share of tokens."""

    risk: float
    tokens: float
    layers_per_token: float
    leaving: dict[int, float]


@dataclass(frozen=True)
class Calibrated:
    """A calibration and how it came about. agreement: exit layer -> share of tokens that would be the full model's if
    all left there. candidates: limits in the order tested; tested: results, by index in `candidates`."""

    calibration: Calibration
    measured: Measured
    agreement: dict[int, float]
    candidates: list[Limits]
    tested: list[Tested]


def calibrate(llm: LLM, decoded: Sequence[Decoded], promise: Promise, *, text: str = "",
              trace: ExitTrace | None = None, advance: Advance | None = None) -> Calibrated:
    """The fastest thresholds that the sequences certify.

    decoded: sequences of the full model's own making, see `calibration_text`; at least `promise.least`. trace: of
    these, where it was made before (for several criteria). text: what they are, for the record.
    Raises NotEnoughTextError, CalibrationError where no thresholds are certified, InvalidRequestError for a model
    without exits.
    """
    replay = Replay(llm)
    check_enough(llm, decoded, promise)
    trace = trace or replay.trace(decoded, advance)
    order = np.random.default_rng(promise.seed).permutation(len(decoded))
    held = _tuning(len(decoded), promise.tuning)
    tuning, testing = trace.chosen(order[:held]), trace.chosen(order[held:])
    path = safest_to_fastest(tuning, promise.criterion)
    if promise.missing_kv == "propagate":
        path = near(path, tuning, promise.criterion, promise.risk, REPLAYED_SHARES)
    outcome = _outcome(replay, [decoded[i] for i in order[held:]], testing, promise.criterion, promise.missing_kv, path,
                       advance)
    tested = certify_in_sequence(range(len(path)), lambda i: testing.losses(outcome(path[i]).differs), promise.risk,
                                 promise.delta, promise.bound)
    best = max((t.number for t in tested if t.certified), default=0)
    if not best:
        raise CalibrationError("early exit", _nothing(promise, tested, testing))
    measured = _measured(testing, outcome(path[best]))
    config, now = llm.config, datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Calibrated(Calibration(
        fingerprint=llm._loaded.fingerprint(), model=config.name if config else "", criterion=promise.criterion,
        missing_kv=promise.missing_kv, risk=promise.risk, confidence=promise.confidence,
        thresholds={layer: limit for layer, limit in zip(trace.exits, path[best]) if math.isfinite(limit)},
        exit_layers=trace.exits, trained=bool(config and set(trace.exits) <= set(config.exit_layers)),
        layers=trace.layers, layers_per_token=round(measured.layers_per_token, 4),
        measured_risk=round(measured.risk, 6), measured_tokens=round(measured.tokens, 6),
        documents=len({one.document for one in decoded}), sequences=len(decoded), tuning=held, tokens=trace.positions,
        seed=promise.seed, date=now, version=__version__, text=text,
    ), measured, {layer: float(1 - trace.wrong[e].mean()) for e, layer in enumerate(trace.exits)}, path, tested)


def check_enough(llm: LLM, decoded: Sequence[Any], promise: Promise) -> None:
    """Raise what `calibrate` would raise before anything is replayed. decoded: the sequences, or the passages that they
    will be made of, one each at most."""
    EarlyExit("recompute").check(exits_of(llm))
    if len(decoded) < promise.least:
        raise NotEnoughTextError("sequences", len(decoded), promise.least,
                                 f"it takes to promise a risk of {promise.risk:g} at {promise.confidence:g}")


def measure(llm: LLM, decoded: Sequence[Decoded], limits: Limits, criterion: str, missing_kv: str = "recompute",
            trace: ExitTrace | None = None) -> Measured:
    """What limits do on sequences, which may be others than they were calibrated on. trace: of these, where known."""
    replay = Replay(llm)
    EarlyExit("recompute").check(replay.exits)
    trace = trace or replay.trace(decoded)
    return _measured(trace, _outcome(replay, decoded, trace, criterion, missing_kv, [limits])(limits))


@dataclass(frozen=True)
class _Seen:
    """Of N positions: differs bool [N]; depth() int [N], the layers that each passed."""

    differs: np.ndarray
    depth: Callable[[], np.ndarray]


def _outcome(replay: Replay, decoded: Sequence[Decoded], trace: ExitTrace, criterion: str, missing_kv: str,
             candidates: Sequence[Limits], advance: Advance | None = None) -> Callable[[Limits], _Seen]:
    """What limits do on the sequences of a trace, from the trace where it tells, else from a replay of each."""
    if missing_kv == "propagate":
        made = dict(zip(candidates, replay.propagated(decoded, criterion, candidates, advance)))

        def replayed(limits: Limits) -> _Seen:
            tokens, depth = made[limits]
            return _Seen(tokens != trace.tokens, lambda: depth)

        return replayed
    cap = EarlyExit("recompute").max_pending

    def recomputed(limits: Limits) -> _Seen:
        """Positions read exact KV, so that one trace answers for all candidates. Disagreement is counted without the
        cap on waiting states, which only makes more tokens pass all layers."""
        left = trace.leaves(criterion, limits)
        return _Seen(trace.differs(left), lambda: trace.depth(trace.with_cap(left, cap)))

    return recomputed


def _measured(trace: ExitTrace, seen: _Seen) -> Measured:
    depth = seen.depth()
    levels, counts = np.unique(depth, return_counts=True)
    return Measured(float(trace.losses(seen.differs).mean()), float(seen.differs.mean()), float(depth.mean()),
                    {int(level): int(count) / len(depth) for level, count in zip(levels, counts)})


def _tuning(sequences: int, share: float) -> int:
    return max(1, round(sequences * share))


def _nothing(promise: Promise, tested: Sequence[Tested], trace: ExitTrace) -> str:
    """Why nothing was certified: the second candidate is the first that lets tokens leave."""
    if len(tested) < 2:
        return "the exits let no token leave; thresholds in the model's range of confidences do not exist"
    mean = tested[-1].mean
    said = (f"no thresholds keep the risk of {promise.risk:g} with confidence {promise.confidence:g}: the safest let "
            f"{mean:.2%} of tokens differ on {trace.sequences} sequences (p = {tested[-1].p:.2g})")
    if mean < promise.risk:
        need = math.ceil(math.log(1 / promise.delta) / (promise.risk - mean) / (1 - promise.tuning))
        return f"{said}. About {max(need, 2 * trace.sequences)} sequences may suffice, or a higher --risk"
    return f"{said}. Allow a higher --risk, or use exits in later layers or a model trained for early exit"
