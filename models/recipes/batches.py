"""Training batches: a batch is a function of the recipe and its number, so that a resumed run sees the same ones."""
from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .bpe import encode_turns
from .config import RecipeConfig
from .corpus import document_turns, system_turn, training_turns
from .documents import make_document

PAD = 0  # <|endoftext|>


@dataclass(frozen=True)
class Batch:
    """tokens: int64 [B, T + 1]. positions: int64 [N], indices into the B * T inputs that get a loss. weights: float32
    [N]: 1 for the assistant's tokens, less for the rest, 0 where a row had too few."""

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def _row(tokenizer: Tokenizer, rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
    """A conversation that fills at most `length` tokens: documents follow each other until the next does not fit."""
    ids, spoken = encode_turns(tokenizer, system_turn(rng))
    misses = 0
    while misses < 3:
        turns = training_turns(rng) if misses < 2 or ids else document_turns(make_document(rng), rng)
        more, said = encode_turns(tokenizer, turns)
        while len(ids) + len(more) > length and len(turns) > 2:
            turns = turns[:-2]
            more, said = encode_turns(tokenizer, turns)
        if len(ids) + len(more) > length:
            misses += 1
            continue
        ids, spoken = ids + more, spoken + said
        if length - len(ids) < 60:
            break
    return ids, spoken


def make_batch(config: RecipeConfig, tokenizer: Tokenizer, number: int) -> Batch:
    """Batch `number` of the recipe's stream."""
    rng = random.Random(f"batch/{config.seed}/{number}")
    lengths, shares = zip(*config.row_lengths)
    T = rng.choices(lengths, shares)[0]
    B = max(1, config.batch_tokens // T)
    tokens = np.full((B, T + 1), PAD, np.int64)
    spoken = np.zeros((B, T + 1), bool)
    real = np.zeros((B, T + 1), bool)
    for row in range(B):
        ids, said = _row(tokenizer, rng, T + 1)
        tokens[row, : len(ids)], spoken[row, : len(ids)], real[row, : len(ids)] = ids, said, True
    return Batch(tokens, *_loss_positions(config, rng, spoken[:, 1:].ravel(), real[:, 1:].ravel()))


def _loss_positions(config: RecipeConfig, rng: random.Random, spoken: np.ndarray,
                    real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A fixed count of positions, answers first: the head then costs the same in every batch of one shape."""
    count = int(len(spoken) * config.loss_share)
    order = np.random.default_rng(rng.getrandbits(64)).permutation(len(spoken))
    rank = np.where(spoken[order], 0, np.where(real[order], 1, 2))
    chosen = np.sort(order[np.argsort(rank, kind="stable")][:count])
    weights = np.where(spoken[chosen], 1.0, np.where(real[chosen], config.context_weight, 0.0))
    return chosen, weights.astype(np.float32)
