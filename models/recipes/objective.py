"""The loss of one batch under a recipe: cross-entropy, a teacher, early exits, layer dropout."""
from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch
from .config import RecipeConfig
from .losses import dropout_rates, exit_weights, full_kl, hidden_match, weighted_mean
from .network import Network

PARTS = ("cross_entropy", "divergence", "exit")  # what `Objective` reports beside its loss


def blended(logits: Tensor, targets: Tensor, weights: Tensor, teacher: Tensor | None, share: float,
            temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy and divergence from the teacher (nats, weighted means) of logits [N, V]; targets int64 [N],
    weights float32 [N], the teacher's logits [N, V]. Without a teacher the loss is the cross-entropy."""
    cross_entropy = weighted_mean(F.cross_entropy(logits.float(), targets, reduction="none"), weights)
    if teacher is None:
        return cross_entropy, cross_entropy, torch.zeros(())
    divergence = weighted_mean(full_kl(logits, teacher, temperature), weights)
    return share * divergence + (1 - share) * cross_entropy, cross_entropy, divergence


class Objective:
    """`objective(batch, number)` is the loss of batch `number`, a function of the recipe and the number alone."""

    def __init__(self, config: RecipeConfig, network: Network, teacher: Network | None = None, compiled: bool = False):
        self.config, self.network, self.teacher = config, network, teacher
        self.rates = dropout_rates(config.network.layers, config.layer_dropout)
        self.blended = torch.compile(blended, dynamic=False) if compiled else blended
        if compiled:
            compile_blocks(network)
            if teacher is not None:
                compile_blocks(teacher)

    def exit_of(self, number: int) -> int:
        """The exit whose loss batch `number` counts, 0 for none."""
        progress = number / (self.config.steps * self.config.batches_per_step)
        joined = [e for e in exit_weights(self.config.exits, self.config.network.layers, progress,
                                          curriculum=self.config.exit_curriculum) if e < self.config.network.layers]
        return joined[number % len(joined)] if joined else 0

    def skipped(self, number: int) -> set[int]:
        """The layers, from 0, that batch `number` leaves out."""
        rng = random.Random(f"dropout/{self.config.seed}/{number}")
        return {layer for layer, rate in enumerate(self.rates) if rng.random() < rate}

    def __call__(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, float]]:
        c = self.config
        tokens = torch.from_numpy(batch.tokens)
        positions, weights = torch.from_numpy(batch.positions), torch.from_numpy(batch.weights)
        targets = tokens[:, 1:].flatten().index_select(0, positions)
        share = c.teacher_share / (1 - c.hidden_share) if c.hidden_share < 1 else 0.0
        with torch.autocast("cpu", torch.bfloat16):
            taught = seen = None
            if self.teacher is not None:
                with torch.no_grad():
                    seen = self._at(self.teacher, self.teacher.residuals(tokens[:, :-1])[-1], positions)
                    taught = F.linear(seen, self.teacher.output_weight)
            states = self.network.residuals(tokens[:, :-1], self.skipped(number))
            hidden = self._at(self.network, states[-1], positions)
            logits = F.linear(hidden, self.network.output_weight)
            loss, cross_entropy, divergence = self.blended(logits, targets, weights, taught, share, c.temperature)
            if seen is not None and c.hidden_share:
                loss = (1 - c.hidden_share) * loss + c.hidden_share * hidden_match(hidden, seen)
            parts = {"cross_entropy": cross_entropy.item(), "divergence": divergence.item(), "exit": 0.0}
            layer = self.exit_of(number)
            if layer:
                early = F.linear(self._at(self.network, states[layer], positions), self.network.output_weight)
                exit_loss, parts["exit"] = self.blended(early, targets, weights, taught, share, c.temperature)[:2]
                parts["exit"] = parts["exit"].item()
                loss = (loss + c.exit_scale * exit_loss) / (1 + c.exit_scale)
        return loss, parts

    @staticmethod
    def _at(network: Network, residual: Tensor, positions: Tensor) -> Tensor:
        return network.final_norm(residual.flatten(0, 1).index_select(0, positions))


def compile_blocks(network: Network) -> None:
    """Fuses each block; all blocks of a shape share one compilation, so depth costs no compile time."""
    torch._dynamo.config.recompile_limit = 64
    for block in network.blocks:
        block.compile(dynamic=False)
