"""Early exit on the command line: the options that commands share, and what they mean together."""
from __future__ import annotations

from typing import Annotated, Any

import typer

from edge_runtime.errors import InvalidRequestError

DEFAULT_CRITERION = "max_prob"

ExitWay = Annotated[str | None, typer.Option(
    "--early-exit", help="Let tokens leave the network early: verify (same reply), recompute or propagate.",
    show_default=False)]
ExitLayers = Annotated[str | None, typer.Option(
    "--exit-layers", help="Layers after which tokens may leave, such as 8,12.",
    show_default="those the model was trained for")]
ExitThresholds = Annotated[list[str] | None, typer.Option(
    "--exit-threshold", help="LAYER=CONFIDENCE from which tokens leave there; repeatable.",
    show_default="the calibrated ones")]
ExitCriterion = Annotated[str, typer.Option("--exit-criterion", help="max_prob, margin, entropy, or layer.")]
ExitLayer = Annotated[int | None, typer.Option(
    "--exit-layer", help="The layer that drafts, or that all leave at (criterion layer).", show_default=False)]


def exit_layers_of(text: str | None) -> list[int] | None:
    """The value of --exit-layers. Raises `InvalidRequestError`."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequestError("exit_layers", text, "layers with commas between, such as 8,12") from None


def early_exit_of(way: str | None, criterion: str, layer: int | None, thresholds: list[str] | None) -> Any:
    """An `EarlyExit`, or None where --early-exit is not given. Raises `InvalidRequestError`."""
    from edge_runtime.early_exit import EarlyExit

    if way is None:
        if thresholds or layer is not None or criterion != DEFAULT_CRITERION:
            raise InvalidRequestError("early_exit", None, "given with --exit-threshold, --exit-layer and "
                                                          "--exit-criterion")
        return None
    limits: dict[int, float] = {}
    for pair in thresholds or []:
        where, _, limit = pair.partition("=")
        try:
            at, confidence = int(where), float(limit)
        except ValueError:
            raise InvalidRequestError("exit_threshold", pair, "LAYER=CONFIDENCE, such as 8=0.9") from None
        if at in limits:
            raise InvalidRequestError("exit_threshold", pair, f"the only one of layer {at}: it has {limits[at]:g}")
        limits[at] = confidence
    return EarlyExit(way, criterion, limits or None, layer)


def exits_text(stats: Any) -> str:
    """Where the tokens of a reply left, for people; empty without early exit."""
    if not stats.exits:
        return ""
    left = ", ".join(f"{count} after layer {layer}" for layer, count in stats.exits.items())
    drafts = f" | drafts right {stats.accepted} of {stats.drafted}" if stats.drafted else ""
    return f"layers per token {stats.layers_per_token:.2f}: {left}{drafts}"
