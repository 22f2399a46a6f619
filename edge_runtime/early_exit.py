"""Early exit as a caller asks for it: where a token may leave the network, when, and what becomes of the layers above.

A model with exits has a final norm and head that read the residual stream after some earlier layers too (LayerSkip,
arXiv 2404.16710). Leaving is cheap but leaves a hole: the layers above have no KV of that position. Three ways to close
it, by name:

verify: leaving early only drafts; the layers above check several drafts in one pass. The reply is the full model's,
    token for token, greedy or drawn.
recompute: the hidden states of tokens that left wait, and pass the layers above together with the next token that does
    not leave (EE-LLM, arXiv 2312.04916).
propagate: the layers above get K and V of the state that left (CALM, arXiv 2207.07061). Cheapest, and an approximation.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.devices.base import ExitRule
from edge_runtime.errors import InvalidRequestError
from edge_runtime.speculation import STOP_BELOW, Acceptance

MISSING_KV = ("verify", "recompute", "propagate")
CRITERIA = ("max_prob", "margin", "entropy", "layer")
MOST_DRAFTS = 16
MOST_PENDING = 64
OUT_OF_REACH = 1e35  # a limit that marks an exit as used and lets nobody leave: the device does not even ask


@dataclass(frozen=True)
class EarlyExit:
    """How the tokens of a reply may leave early.

    missing_kv: what becomes of the layers above. "verify": leaving only drafts, and they check several drafts in one
        pass: the full model's text. "recompute": they catch up with the next token that does not leave. "propagate":
        they take the state that left; cheapest, an approximation.
    criterion: what a row's confidence at an exit is, from the distribution that the head makes there: "max_prob", the
        largest probability; "margin", the largest less the second; "entropy", 1 - H / ln V; "layer": none, every token
        leaves at `layer`.
    thresholds: exit layer (layers run before it) -> confidence from which a token leaves there, between 0 and 1; layers
        left out are not used. None: the calibrated ones of this model, see `edge-runtime calibrate`. For "verify" they
        say when drafting stops instead: below the draft layer's threshold the drafts so far are checked. None: it
        follows from how many drafts were accepted.
    layer: the exit of the criterion "layer" and of the drafts of "verify"; None: for drafts the lowest exit.
    max_pending: recompute only: after this many tokens without a full pass the next one is full; fewer where the
        `max_batch` sequences share the rows of a step (the CPU's 512): with more than 256 of them no token leaves.
    max_draft: verify only: drafts at most before a check.
    """

    missing_kv: str = "verify"
    criterion: str = "max_prob"
    thresholds: Mapping[int, float] | None = None
    layer: int | None = None
    max_pending: int = 8
    max_draft: int = 8

    def __post_init__(self) -> None:
        if self.missing_kv not in MISSING_KV:
            raise InvalidRequestError("early_exit.missing_kv", self.missing_kv, f"one of {', '.join(MISSING_KV)}")
        if self.criterion not in CRITERIA:
            raise InvalidRequestError("early_exit.criterion", self.criterion, f"one of {', '.join(CRITERIA)}")
        _whole("early_exit.max_pending", self.max_pending, 1, MOST_PENDING)
        _whole("early_exit.max_draft", self.max_draft, 1, MOST_DRAFTS)
        if self.layer is not None:
            _whole("early_exit.layer", self.layer, 1, None)
        if self.criterion == "layer" and self.layer is None:
            raise InvalidRequestError("early_exit.layer", None, 'an exit layer, for the criterion "layer"')
        if self.thresholds is not None:
            if not isinstance(self.thresholds, Mapping):
                raise InvalidRequestError("early_exit.thresholds", self.thresholds,
                                          "a mapping from exit layer to a confidence between 0 and 1")
            for layer, threshold in self.thresholds.items():
                _whole("early_exit.thresholds", layer, 1, None)
                if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < 1:
                    raise InvalidRequestError(f"early_exit.thresholds[{layer}]", threshold,
                                              "a confidence above 0 and below 1")
            object.__setattr__(self, "thresholds", dict(sorted(self.thresholds.items())))

    @classmethod
    def of(cls, value: EarlyExit | str | Mapping[str, Any] | None) -> EarlyExit | None:
        """From what a caller may write: an EarlyExit, "verify", a mapping of its fields (keys of thresholds may be
        strings, as JSON has them), None."""
        if value is None or isinstance(value, EarlyExit):
            return value
        if isinstance(value, str):
            return cls(missing_kv=value)
        if not isinstance(value, Mapping):
            raise InvalidRequestError("early_exit", value, f"an EarlyExit, one of {', '.join(MISSING_KV)}, or None")
        names = cls.__dataclass_fields__
        for name in value:
            if name not in names:
                raise InvalidRequestError("early_exit", name, f"fields {', '.join(names)}")
        values = dict(value)
        if isinstance(values.get("thresholds"), Mapping):
            limits = values["thresholds"]
            values["thresholds"] = {_layer_key(key): limit for key, limit in limits.items()}
            if len(values["thresholds"]) < len(limits):
                raise InvalidRequestError("early_exit.thresholds", dict(limits), "one threshold for each layer")
        return cls(**values)

    def check(self, exits: Sequence[int]) -> None:
        """Raise `InvalidRequestError` where this names a layer that is no exit of the model."""
        if not exits:
            raise InvalidRequestError(
                "early_exit", self.missing_kv, "None for this model: its file names no exit layers "
                "(edge.early_exit.layers). LLM(..., exit_layers=[...]) or --exit-layers tries layers that were not "
                "trained for it")
        asked = [*(self.thresholds or {}), *([] if self.layer is None else [self.layer])]
        for layer in asked:
            if layer not in exits:
                raise InvalidRequestError("early_exit layer", layer, f"an exit of this model: {_list(exits)}")

    @property
    def drafts(self) -> bool:
        return self.missing_kv == "verify"

    def draft_layer(self, exits: Sequence[int]) -> int:
        """The exit that drafts, for `verify`."""
        return self.layer if self.layer is not None else exits[0]

    def limits(self, exits: Sequence[int], calibrated: Mapping[int, float] | None = None) -> tuple[float, ...]:
        """A confidence per exit from which tokens leave there; infinity: never. Raises `InvalidRequestError` where
        there are no thresholds, by hand or calibrated."""
        if self.criterion == "layer":
            return tuple(-math.inf if layer == self.layer else math.inf for layer in exits)
        chosen = self.thresholds if self.thresholds is not None else calibrated
        if chosen is None:
            raise InvalidRequestError(
                "early_exit.thresholds", None, f"given for {self.missing_kv}: this model has none calibrated for the "
                f"criterion {self.criterion}. Run `edge-runtime calibrate`, or give thresholds by hand")
        return tuple(chosen.get(layer, math.inf) for layer in exits)


@dataclass
class ExitStats:
    """Where the tokens of a reply left.

    layers: exit layer (the model's layers: a full pass) -> tokens; a draft that was accepted counts at the exit that
    drafted it. layers_run: layers computed for the reply, summed over rows; drafts, checks and later passes included.
    drafted, accepted: of `verify`.
    """

    layers: dict[int, int] = field(default_factory=dict)
    layers_run: int = 0
    drafted: int = 0
    accepted: int = 0

    def note(self, layer: int) -> None:
        self.layers[layer] = self.layers.get(layer, 0) + 1


@dataclass(frozen=True)
class ExitPlan:
    """An `EarlyExit` for a model with `layers` layers and these exits. limits: a confidence per exit."""

    early: EarlyExit
    exits: tuple[int, ...]
    layers: int
    limits: tuple[float, ...]
    draft_layer: int = 0
    stop_below: float = STOP_BELOW

    @classmethod
    def of(cls, early: EarlyExit, exits: Sequence[int], layers: int,
           calibrated: Mapping[int, float] | None = None) -> ExitPlan:
        """Raises `InvalidRequestError` where the model has no such exits, or no thresholds are known."""
        early.check(exits)
        if not early.drafts:
            return cls(early, tuple(exits), layers, early.limits(exits, calibrated))
        layer = early.draft_layer(exits)
        stop = (early.thresholds or {}).get(layer, STOP_BELOW)
        return cls(early, tuple(exits), layers, (math.inf,) * len(exits), layer, stop)


class ExitState:
    """One sequence's early exits: the states that wait for a full pass, and what has happened so far.

    exact: tokens from the first on whose KV is what a full model computes; None: all. width: of `Device.state_width`.
    """

    def __init__(self, plan: ExitPlan, width: int, most_pending: int):
        self.plan, self.stats = plan, ExitStats()
        self.most_pending = min(plan.early.max_pending, most_pending)
        self.pending = 0
        self.exact: int | None = None
        self.acceptance = Acceptance()
        waits = plan.early.missing_kv == "recompute"
        self._held = np.empty((self.most_pending + 1, width), np.float32) if waits else None
        self._full = (math.inf,) * len(plan.exits)
        self._first = next((layer for layer, limit in zip(plan.exits, plan.limits) if limit < math.inf), plan.layers)

    def rule(self) -> ExitRule:
        """For the next decoded token."""
        early = self.plan.early
        if early.missing_kv == "propagate":
            return ExitRule(early.criterion, self.plan.limits, True)
        if self.pending < self.most_pending:
            return ExitRule(early.criterion, self.plan.limits, False, self._held, self.pending)
        # The waiting states come along past the first exit that has a limit: one that nothing reaches.
        never = tuple(OUT_OF_REACH if limit < math.inf else limit for limit in self.plan.limits)
        return ExitRule("max_prob", never, False, self._held, self.pending)

    def note(self, layer: int, position: int) -> None:
        """The token at `position` left after `layer` layers."""
        stats, full = self.stats, self.plan.layers
        stats.note(layer)
        stats.layers_run += layer
        if self.plan.early.missing_kv == "recompute":
            if layer > self._first:  # the waiting ones went along as far
                stats.layers_run += self.pending * (layer - self._first)
            self.pending = self.pending + 1 if layer < full else 0
        elif layer < full and self.exact is None:
            self.exact = position

    def note_drafts(self, rows: int, accepted: int, tokens: int, asked: int) -> None:
        """A check of `rows` rows, `asked` drafts at most, let `accepted` pass and gave `tokens` tokens of the reply."""
        stats = self.stats
        stats.drafted += rows - 1
        stats.accepted += accepted
        stats.layers_run += rows * self.plan.layers
        for layer, count in ((self.plan.draft_layer, min(accepted, tokens)), (self.plan.layers, tokens - accepted)):
            if count > 0:
                stats.layers[layer] = stats.layers.get(layer, 0) + count
        self.acceptance.note(rows - 1, accepted, asked)

    def forget(self) -> None:
        """The KV is gone: everything is computed again, in full."""
        self.pending, self.exact = 0, None

    def exact_tokens(self, computed: int) -> int:
        """Of `computed` tokens with KV, how many have a full model's, from the first on."""
        return min(computed - self.pending, computed if self.exact is None else self.exact)


def check_exit_layers(layers: Sequence[int], total: int) -> tuple[int, ...]:
    """Exit layers that a caller names for a model of `total` layers. Raises `InvalidRequestError`."""
    wanted = f"layers from 1 to {total - 1}, ascending, none twice" if total > 1 else "None: this model has one layer"
    if isinstance(layers, str | bytes) or not isinstance(layers, Sequence) or not layers:
        raise InvalidRequestError("exit_layers", layers, wanted)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < total:
            raise InvalidRequestError("exit_layers", layer, wanted)
    if list(layers) != sorted(set(layers)):
        raise InvalidRequestError("exit_layers", _list(layers), wanted)
    return tuple(layers)


def _layer_key(key: Any) -> Any:
    # Longer strings of digits name no layer, and int() refuses the longest.
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise InvalidRequestError(name, value, f"a whole number from {low}" + (f" to {high}" if high else " up"))


def _list(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
