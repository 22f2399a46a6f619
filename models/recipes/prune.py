"""Structured pruning: whole groups of heads, FFN channels and layers go, those that a calibration text needs least.

Heads that share a kv head go together, and as many in every layer, so that what is left is an ordinary model.
Importance of a channel: the energy it writes into the residual stream (activations), or the first-order change of the
loss without it (gradients; Molchanov et al. 2019, https://arxiv.org/abs/1906.10771). Of a layer: how far it turns the
residual stream (ShortGPT, Men et al. 2024, https://arxiv.org/abs/2403.03853).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.errors import InvalidRequestError
from edge_runtime.quant.mixtures import file_type, mixed_format

from .network import Network
from .network_file import tensor_names

METHODS = ("activations", "gradients")


@dataclass(frozen=True)
class Importance:
    """Larger: more is lost without it. groups: [L, K], of the heads that share a kv head; channels: [L, F]; layers:
    [L], 1 - cosine of the residual stream before and after."""

    groups: np.ndarray
    channels: np.ndarray
    layers: np.ndarray


def measure_importance(network: Network, rows: Iterable[Tensor], method: str = "activations") -> Importance:
    """What every part contributes on calibration rows, each int64 [T]. Weights and gradients stay as they are."""
    if method not in METHODS:
        raise InvalidRequestError("method", method, f"one of {', '.join(METHODS)}")
    c = network.config
    groups, channels = torch.zeros(c.layers, c.kv_heads), torch.zeros(c.layers, c.ffn)
    turned, count = torch.zeros(c.layers), 0
    weights = [p for p in network.parameters() if p.requires_grad]
    with _Inputs(network) as inputs:
        for row in rows:
            count += 1
            tokens = row[None].to(network.embedding.device)
            network.requires_grad_(False)
            try:
                with torch.set_grad_enabled(method == "gradients"):
                    inputs.reset(method == "gradients")
                    states = network.residuals(tokens)
                    if method == "gradients":
                        logits = F.linear(network.final_norm(states[-1]), network.output_weight)[0, :-1]
                        F.cross_entropy(logits.float(), tokens[0, 1:]).backward()
            finally:
                for parameter in weights:
                    parameter.requires_grad_(True)
            for layer in range(c.layers):
                before, after = states[layer].detach().float(), states[layer + 1].detach().float()
                turned[layer] += 1 - F.cosine_similarity(before, after, -1).mean().cpu()
                groups[layer] += _score(inputs.heads[layer], network.blocks[layer].attention.o, c.kv_heads)
                channels[layer] += _score(inputs.channels[layer], network.blocks[layer].ffn.down, c.ffn)
    if not count:
        raise InvalidRequestError("rows", 0, "at least one row of calibration text")
    return Importance(*((x / count).numpy() for x in (groups, channels, turned)))


@torch.no_grad()
def _score(values: Tensor, matrix: nn.Linear, parts: int) -> Tensor:
    """[parts] of the matrix's inputs: the mean energy of what each writes, or |value * gradient| where there is one."""
    flat = values.detach().flatten(0, -2).float()
    if values.grad is not None:
        change = (flat * values.grad.flatten(0, -2).float()).view(len(flat), parts, -1).sum(-1)
        return change.abs().mean(0).cpu()
    if parts == flat.shape[1]:  # one input each: the energy factors
        return (flat.square().mean(0) * matrix.weight.float().square().sum(0)).cpu()
    pieces = zip(flat.chunk(parts, 1), matrix.weight.float().chunk(parts, 1))
    return torch.stack([(x @ w.T).square().sum(1).mean() for x, w in pieces]).cpu()


class _Inputs:
    """What goes into every layer's o and down matrices."""

    def __init__(self, network: Network):
        self.heads: dict[int, Tensor] = {}
        self.channels: dict[int, Tensor] = {}
        self.gradients = False
        self.handles = []
        for number, block in enumerate(network.blocks):
            self.handles.append(block.attention.o.register_forward_pre_hook(self._keep(self.heads, number)))
            self.handles.append(block.ffn.down.register_forward_pre_hook(self._keep(self.channels, number)))

    def _keep(self, store: dict[int, Tensor], number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], object]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> object:
            value = arguments[0]
            if self.gradients:  # weights want no gradient here, so the first layers' inputs have no history
                value = value if value.requires_grad else value.detach().requires_grad_()
                if not value.is_leaf:
                    value.retain_grad()
            store[number] = value
            return (value,)
        return hook

    def reset(self, gradients: bool) -> None:
        self.gradients = gradients
        self.heads.clear()
        self.channels.clear()

    def __enter__(self) -> _Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def most_important(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest, ascending."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def even_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers`, from 0, evenly spread, the first and the last among them where there are two."""
    if count == 1:
        return [0]
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def keep_layers(network: Network, layers: Sequence[int]) -> Network:
    """A network of the layers named, from 0 and ascending, with copies of their weights."""
    if not layers or list(layers) != sorted(set(layers)) or min(layers) < 0 or max(layers) >= network.config.layers:
        raise InvalidRequestError("layers", list(layers), f"ascending numbers from 0 to {network.config.layers - 1}")
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("blocks.")}
    for new, old in enumerate(layers):
        prefix = f"blocks.{old}."
        state |= {f"blocks.{new}.{name[len(prefix):]}": value for name, value in network.state_dict().items()
                  if name.startswith(prefix)}
    return _rebuilt(network, state, layers=len(layers))


def keep_channels(network: Network, channels: Sequence[Sequence[int]]) -> Network:
    """A network with the FFN channels named for each layer, as many in each."""
    count = _same_count("ffn", channels, network.config.layers, network.config.ffn)
    state = dict(network.state_dict())
    for layer, kept in enumerate(channels):
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            key = f"blocks.{layer}.ffn.{name}.weight"
            state[key] = state[key].index_select(axis, torch.as_tensor(kept, device=state[key].device))
    return _rebuilt(network, state, ffn=count)


def keep_groups(network: Network, groups: Sequence[Sequence[int]]) -> Network:
    """A network with the kv heads named for each layer and the query heads that share them, as many in each."""
    c = network.config
    count = _same_count("kv_heads", groups, c.layers, c.kv_heads)
    share = c.heads // c.kv_heads
    state = dict(network.state_dict())
    for layer, kept in enumerate(groups):
        for name, size, axis in (("q", share, 0), ("k", 1, 0), ("v", 1, 0), ("o", share, 1)):
            rows = np.concatenate([np.arange(g * size * c.head_size, (g + 1) * size * c.head_size) for g in kept])
            for key in (f"blocks.{layer}.attention.{name}.weight", f"blocks.{layer}.attention.{name}.bias"):
                if key in state:
                    state[key] = state[key].index_select(axis, torch.from_numpy(rows).to(state[key].device))
    return _rebuilt(network, state, kv_heads=count, heads=count * share)


def shrink(network: Network, importance: Importance, *, kv_heads: int = 0, ffn: int = 0) -> Network:
    """The most important groups and channels of every layer; 0: all."""
    if kv_heads:
        _within("kv_heads", kv_heads, network.config.kv_heads)
        network = keep_groups(network, [most_important(scores, kv_heads) for scores in importance.groups])
    if ffn:
        _within("ffn", ffn, network.config.ffn)
        network = keep_channels(network, [most_important(scores, ffn) for scores in importance.channels])
    return network


@dataclass(frozen=True)
class SizePoint:
    """One student of the curve. bytes: of its weights in the file type asked for; perplexity: of the rows measured,
    recovered: after the short recovery, where there was one."""

    layers: int
    kv_heads: int
    ffn: int
    parameters: int
    bytes: int
    perplexity: float
    recovered: float | None = None


def curve(network: Network, calibration: Sequence[Tensor], held_out: Sequence[Tensor],
          sizes: Iterable[tuple[int, int, int]], *, type: str = "Q4_0", method: str = "activations",
          recover: Callable[[Network], Network] | None = None,
          report: Callable[[SizePoint], object] = lambda point: None) -> list[SizePoint]:
    """Size against quality: for each (layers, kv_heads, ffn) of `sizes` (0: all) the student pruned from `network` by
    what `calibration` needs, and its perplexity on `held_out`, before and after `recover`. report: each as it is known.
    """
    points = []
    whole = measure_importance(network, calibration, method)
    for layers, kv_heads, ffn in sizes:
        student = network
        if layers:
            _within("layers", layers, network.config.layers)
            student = keep_layers(network, most_important(whole.layers, layers))
        if kv_heads or ffn:
            student = shrink(student, measure_importance(student, calibration, method), kv_heads=kv_heads, ffn=ffn)
        before = perplexity(student, held_out)
        after = perplexity(recover(student), held_out) if recover else None
        c = student.config
        points.append(SizePoint(c.layers, c.kv_heads, c.ffn, c.parameters, weight_bytes(student, type), before, after))
        report(points[-1])
    return points


@torch.no_grad()
def perplexity(network: Network, rows: Iterable[Tensor]) -> float:
    """Of the tokens of rows, each int64 [T], given those before them in the row."""
    loss, count = 0.0, 0
    for row in rows:
        tokens = row.to(network.embedding.device)
        logits = network(tokens[None, :-1])[0].float()
        loss += float(F.cross_entropy(logits, tokens[1:], reduction="sum"))
        count += len(tokens) - 1
    return float(np.exp(min(loss / max(count, 1), 700.0)))


def weight_bytes(network: Network, type: str) -> int:
    """Of the weights in a file of that type."""
    chosen, shapes, c = file_type(type), {n: tuple(v.shape) for n, v in network.state_dict().items()}, network.config
    total = 0
    for ours, theirs in tensor_names(c):
        shape = shapes[ours]
        if len(shape) == 1:
            total += 4 * shape[0]
            continue
        layer = int(theirs.split(".")[1]) if theirs.startswith("blk.") else -1
        is_head = ours == ("embedding" if c.tied_head else "head")
        total += shape[0] * mixed_format(chosen, theirs, layer, c.layers, shape[1], is_head).row_bytes(shape[1])
    return total


def _rebuilt(network: Network, state: dict[str, Tensor], **changes: Any) -> Network:
    smaller = Network(replace(network.config, plant=False, **changes)).to(network.embedding.device)
    smaller.load_state_dict({name: value.clone() for name, value in state.items()})
    return smaller.train(network.training)


def _same_count(name: str, kept: Sequence[Sequence[int]], layers: int, most: int) -> int:
    counts = {len(k) for k in kept}
    if len(kept) != layers or len(counts) != 1:
        raise InvalidRequestError(name, [len(k) for k in kept], f"as many in each of the {layers} layers")
    _within(name, next(iter(counts)), most)
    return counts.pop()


def _within(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InvalidRequestError(f"student.{name}", value, f"1 to {most}, what the model has")
