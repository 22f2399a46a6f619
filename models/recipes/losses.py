"""What a student is trained on: a teacher's distribution, its hidden states, and the same again at every early exit.

Knowledge distillation: Hinton et al. 2015 (https://arxiv.org/abs/1503.02531). Early exit: LayerSkip, Elhoushi et al.
2024 (https://arxiv.org/abs/2404.16710).
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def full_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats of logits [N, V] at `temperature`, float32 [N], times its square, so that the
    gradients of a high temperature weigh as much as those of 1."""
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    return (p.exp() * (p - q)).sum(-1) * temperature**2


def top_k_kl(student: Tensor, ids: Tensor, values: Tensor, rest: Tensor, temperature: float = 1.0) -> Tensor:
    """`full_kl` where of the teacher's logits only the largest are known; the others count as one event.

    student: [N, V]. ids: int64 [N, k], the tokens of the largest; values: [N, k], their logits; rest: [N], logsumexp of
    the others' logits / temperature (-inf: there are none). The result is at most the full KL, and equal to it where
    the student spreads the rest as the teacher does.
    """
    logits = student.float() / temperature
    values = values.float() / temperature
    total = torch.logaddexp(values.logsumexp(-1), rest.float())[:, None]
    p = values - total
    q_total = logits.logsumexp(-1)
    kl = (p.exp() * (p - (logits.gather(1, ids) - q_total[:, None]))).sum(-1)
    if ids.shape[1] < logits.shape[1]:
        p_rest = rest.float() - total[:, 0]
        q_rest = logits.scatter(1, ids, float("-inf")).logsumexp(-1) - q_total
        share = p_rest.exp()
        kl = kl + torch.where(share > 0, share * (p_rest.clamp_min(-1e4) - q_rest), torch.zeros_like(share))
    return kl * temperature**2


def hidden_match(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of states [..., W] relative to the teacher's mean square: 1 for a student that says nothing.
    Layers then weigh alike, though the residual stream grows from one to the next."""
    teacher = teacher.float()
    return (student.float() - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """losses, weights: [N]."""
    return (losses * weights).sum() / weights.sum().clamp_min(1e-12)


def exit_weights(exit_layers: Sequence[int], layers: int, progress: float, scale: float = 0.2,
                 curriculum: bool = True) -> dict[int, float]:
    """Weight of the loss after layer e (from 1; `layers` is the full model), for a share `progress` of the training.

    The weights add up to 1. The full model counts 1 beside `scale` times e / layers of an exit: later ones have more
    to say, as in LayerSkip. curriculum: exits join one by one from the last to the first over the first half of the
    training; an exit that has not joined is absent.
    """
    joined = sorted(exit_layers, reverse=True)
    if curriculum and joined:
        joined = joined[:math.floor(len(joined) * min(1.0, 2 * progress) + 1e-9)]
    weights = {layer: scale * layer / layers for layer in joined} | {layers: 1.0}
    total = sum(weights.values())
    return {layer: weight / total for layer, weight in sorted(weights.items())}


def dropout_rates(layers: int, most: float) -> list[float]:
    """The rate at which layer dropout leaves out each layer: 0 for the first, growing exponentially to `most`."""
    if layers < 2:
        return [0.0] * layers
    return [most * (2 ** (layer / (layers - 1)) - 1) for layer in range(layers)]
