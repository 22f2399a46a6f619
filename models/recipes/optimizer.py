"""Muon for the matrices, AdamW for the embedding and the norms."""
from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from .config import RecipeConfig

# Quintic Newton-Schulz coefficients with the steepest slope at zero (K. Jordan, "Muon", 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(gradients: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix of gradients [n, rows, columns], rows <= columns, in bfloat16."""
    x = gradients.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan 2024), matrices of one shape stacked into one product."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                rows, columns = parameter.shape
                shapes[min(rows, columns), max(rows, columns)].append(parameter)
            for same in shapes.values():
                self._update(same, group)

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient = parameter.grad
            assert gradient is not None
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"])
            updates.append(update.mT if update.shape[0] > update.shape[1] else update)
        for parameter, update in zip(parameters, orthogonalize(torch.stack(updates)).float()):
            rows, columns = parameter.shape
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            parameter.add_(update.mT if rows > columns else update, alpha=-rate)


def make_optimizers(network: nn.Module, config: RecipeConfig) -> list[torch.optim.Optimizer]:
    """Muon over the blocks' matrices and AdamW over the rest; each group keeps its full rate in `peak`."""
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and n != "embedding"]
    vectors = [p for n, p in network.named_parameters() if p.ndim != 2 or n == "embedding"]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, config.matrix_rate, config.momentum, config.weight_decay),
        torch.optim.AdamW(vectors, lr=config.vector_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(config: RecipeConfig, step: int) -> float:
    """Share of the full rates at a step."""
    steps, shares = [point[0] for point in config.rate_points], [point[1] for point in config.rate_points]
    return float(np.interp(step, steps, shares))
