"""An induction circuit planted at initialization, so that copying need not be discovered.

Summaries and answers copy names and numbers. Networks find the two-step circuit that copies (a head that writes the
previous token into each place, and a later head that looks for the place whose previous token is the current one;
Olsson et al. 2022, "In-context Learning and Induction Heads") only after thousands of steps, and nothing improves much
before. Here it is written into the first weights; training then shapes it like all others.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import NetworkConfig

SHARP = 6.6  # scale of q and k of the previous-token head: its score falls by 5 from offset 1 to 0 and 2
MATCH = 2.6  # scale of q and k of the matching heads: about 12 for the same token, 2 of noise between others
FAST_PAIRS = 6  # rotary pairs, fastest first, that tell one offset from the next
SLOW = 0.0065  # radians per token: pairs that turn slower compare contents over a few hundred tokens


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows [rows, columns]."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T.contiguous()


@torch.no_grad()
def plant_copying(network: Any, generator: torch.Generator) -> None:
    """Writes the circuit into layer 0 (previous token) and layers 1 and 3 (match and copy) of a `network.Network`.

    Feature 0 of every embedding becomes a constant, which the previous-token head multiplies into its offset.
    """
    c: NetworkConfig = network.config
    half = c.head_size // 2
    speed = c.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    slow = torch.nonzero(speed < SLOW).flatten()
    slow = torch.cat((slow, slow + half))
    basis = _orthogonal(len(slow) * 2, c.width - 1, generator)
    basis = torch.cat((torch.zeros(len(basis), 1), basis), 1)
    read, write = basis[: len(slow)], basis[len(slow) :]
    deviation = float(network.embedding.std())
    network.embedding[:, 0] = 3 * deviation
    first = network.blocks[0].attention
    first.q.weight[: c.head_size] = 0
    first.k.weight[: c.head_size] = 0
    for pair in range(FAST_PAIRS):
        first.q.weight[pair, 0] = SHARP / 3
        first.k.weight[pair, 0] = SHARP / 3 * math.cos(speed[pair])
        first.k.weight[pair + half, 0] = SHARP / 3 * math.sin(speed[pair])
    first.v.weight[: len(slow)] = read
    first.o.weight[:, : len(slow)] = write.T * deviation * math.sqrt(c.width / len(slow))
    for layer in (1, 3):
        if layer < c.layers:
            _plant_match(network.blocks[layer].attention, network.config, slow, read, write, deviation, generator)


def _plant_match(attention: Any, c: NetworkConfig, slow: Tensor, read: Tensor, write: Tensor, deviation: float,
                 generator: torch.Generator) -> None:
    """The first query head of every group looks for its own token in the previous-token features and copies."""
    D, group = c.head_size, c.heads // c.kv_heads
    copied = _orthogonal(min(c.kv_heads * D, c.width - 1), c.width - 1, generator)
    copied = torch.cat((torch.zeros(len(copied), 1), copied), 1)
    for kv_head in range(c.kv_heads):
        head = kv_head * group
        query = torch.zeros(D, c.width)
        key = torch.zeros(D, c.width)
        query[slow], key[slow] = MATCH * read, MATCH * write
        attention.q.weight[head * D : (head + 1) * D] = query
        attention.k.weight[kv_head * D : (kv_head + 1) * D] = key
        part = copied[kv_head * D : (kv_head + 1) * D]
        attention.v.weight[kv_head * D : (kv_head + 1) * D] = part
        attention.o.weight[:, head * D : (head + 1) * D] = part.T * deviation * 4
