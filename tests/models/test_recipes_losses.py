"""The losses against their definitions, and checkpoints that survive kills and full disks."""
from __future__ import annotations

import math
import os

import pytest

from edge_runtime.errors import CorruptModelError

torch = pytest.importorskip("torch")
from edge_runtime.models.recipes import checkpoint  # noqa: E402
from edge_runtime.models.recipes.config import MINUSCULE  # noqa: E402
from edge_runtime.models.recipes.losses import (  # noqa: E402
    dropout_rates,
    exit_weights,
    full_kl,
    hidden_match,
    top_k_kl,
)
from edge_runtime.models.recipes.network import Network  # noqa: E402


def logits(seed: int, count: int = 7, vocabulary: int = 40) -> torch.Tensor:
    return 3 * torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed))


def top(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, ...]:
    values, ids = teacher.topk(k)
    return ids, values, (teacher.scatter(1, ids, float("-inf")) / temperature).logsumexp(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_top_k_kl(temperature):
    teacher, student = logits(0), logits(1)
    full = full_kl(student, teacher, temperature)
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
    torch.testing.assert_close(full, wanted)
    torch.testing.assert_close(top_k_kl(student, *top(teacher, 40, temperature), temperature), full)
    before = torch.zeros(7)
    for k in (1, 4, 16, 39):
        found = top_k_kl(student, *top(teacher, k, temperature), temperature)
        assert (found >= before - 1e-4).all() and (found <= full + 1e-4).all()  # more known, more told
        before = found
    same = top_k_kl(teacher, *top(teacher, 8, temperature), temperature)
    torch.testing.assert_close(same, torch.zeros(7), atol=1e-5, rtol=0)


def test_gradient_moves_the_rest_too():
    teacher, student = logits(0), logits(1).requires_grad_()
    top_k_kl(student, *top(teacher, 4, 2.0), 2.0).sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    assert (student.grad != 0).float().mean() > 0.9
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(7), atol=1e-4, rtol=0)


def test_hidden_match_is_relative():
    state = logits(2)
    assert hidden_match(state, state) == 0
    torch.testing.assert_close(hidden_match(torch.zeros_like(state), state), torch.tensor(1.0))
    torch.testing.assert_close(hidden_match(9 * state, 10 * state), torch.tensor(0.01))


def test_exits_join_from_the_last():
    assert exit_weights([], 6, 0.5) == {6: 1.0}
    assert exit_weights([2, 4], 6, 0.0) == {6: 1.0}
    assert set(exit_weights([2, 4], 6, 0.25)) == {4, 6}
    late = exit_weights([2, 4], 6, 0.5, scale=0.3)
    assert set(late) == {2, 4, 6} and math.isclose(sum(late.values()), 1)
    assert math.isclose(late[4], 2 * late[2]) and math.isclose(late[4] / late[6], 0.2)
    assert set(exit_weights([2, 4], 6, 0.0, curriculum=False)) == {2, 4, 6}
    rates = dropout_rates(5, 0.2)
    assert rates[0] == 0 and math.isclose(rates[-1], 0.2) and rates == sorted(rates)


def test_skipped_blocks_and_residuals():
    network = Network(MINUSCULE.network)
    tokens = torch.arange(12)[None]
    states = network.residuals(tokens)
    assert len(states) == 3
    torch.testing.assert_close(network.final_norm(states[-1]), network.hidden(tokens))
    skipped = network.residuals(tokens, {1})
    torch.testing.assert_close(skipped[2], states[1])


def trained(seed: int) -> tuple[Network, list[torch.optim.Optimizer]]:
    network = Network(MINUSCULE.network, seed)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(network.parameters(), lr=0.01)]
    step(network, optimizers)
    return network, optimizers


def step(network: Network, optimizers: list[torch.optim.Optimizer]) -> float:
    tokens = torch.arange(20)[None]
    loss = torch.nn.functional.cross_entropy(network(tokens)[0, :-1], tokens[0, 1:])
    for optimizer in optimizers:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_restored_training_goes_on_the_same(tmp_path):
    network, optimizers = trained(0)
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, checkpoint.training_tensors(network, optimizers), {"step": 1})
    wanted = [step(network, optimizers) for _ in range(3)]
    other, others = trained(1)
    tensors, state = checkpoint.load_checkpoint(path)
    checkpoint.restore_training(other, others, tensors)
    assert state == {"step": 1}
    assert [step(other, others) for _ in range(3)] == wanted
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    assert checkpoint.load_checkpoint(path)[1] == {"step": 1}
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, {"a": torch.ones(300)}, 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptModelError, match="no checkpoint"):
        checkpoint.load_checkpoint(path)
