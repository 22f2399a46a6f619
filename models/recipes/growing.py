"""Larger networks that compute what a smaller one computes, so that training goes on where the small one stood.

Added blocks write nothing into the residual (their output projections are zero) and stand behind the old ones; added
feed-forward channels have zero down columns (after Chen et al. 2016, "Net2Net").
"""
from __future__ import annotations

import dataclasses
from typing import Any

import torch

from edge_runtime.errors import UnsupportedModelError

from .config import NetworkConfig
from .network import Network

GROWING = ("layers", "ffn", "plant")


def grow(small: Network, config: NetworkConfig, seed: int = 0) -> Network:
    """A network of the shape `config` with the outputs of `small`, whose blocks come first. The added weights are drawn
    from `seed`. UnsupportedModelError where another field than layers and ffn differs, or one of them shrinks."""
    for field in dataclasses.fields(config):
        old: Any = getattr(small.config, field.name)
        new: Any = getattr(config, field.name)
        if field.name not in GROWING and old != new:
            raise UnsupportedModelError(f"growing a network from {field.name}={old} to {new} is not possible: only the "
                                        f"layers and the feed-forward channels grow")
        if field.name in ("layers", "ffn") and new < old:
            raise UnsupportedModelError(f"{field.name}={new} is less than the {old} of the network to grow from")
    large = Network(dataclasses.replace(config, plant=False), seed)
    large.config = config
    target = large.state_dict()
    with torch.no_grad():
        for name, value in small.state_dict().items():
            target[name][tuple(slice(0, size) for size in value.shape)] = value
    return large
