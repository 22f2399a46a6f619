"""Rounding to a GGUF block format with scales that stay as they are, for training and for export alike.

Quantization-aware training computes with the rounded weights and applies the gradients to the float ones: the
straight-through estimator (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). The scales are searched once, before
it, so every code that training saw is the code that the file gets.
"""
from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_runtime.errors import UnsupportedModelError
from edge_runtime.quant.quantize import quantize

BLOCK = 32
# type: (lowest code, highest code, bytes of a block)
TYPES = {"Q4_0": (-8, 7, 18), "Q8_0": (-127, 127, 34)}


def is_rounded(name: str, value: Tensor) -> bool:
    """Whether a weight of a `network.Network` is a matrix that gets a block format."""
    return value.ndim == 2


class Rounding:
    """scales: float32 [rows, inputs / 32] by weight name; every scale is a float16 value. types: format by name."""

    def __init__(self, scales: Mapping[str, Tensor], types: Mapping[str, str]):
        self.scales, self.types = dict(scales), dict(types)
        for name in types.values():
            if name not in TYPES:
                raise UnsupportedModelError(f"training for the format {name} is not written: "
                                            f"choose one of {', '.join(TYPES)}")

    @classmethod
    def search(cls, network: nn.Module, type_name: str, head_type: str,
               importance: Mapping[str, np.ndarray] | None = None) -> Rounding:
        """Scales of the least squared error, weighted by `importance` (mean squares of the inputs, by name)."""
        scales, types = {}, {}
        for name, value in network.state_dict().items():
            if is_rounded(name, value):
                types[name] = head_type if name in ("embedding", "head") else type_name
                weights = None if importance is None else importance.get(name)
                packed = quantize(value.numpy(), types[name], weights, method="search")
                blocks = np.ascontiguousarray(packed.reshape(len(value), -1, TYPES[types[name]][2])[:, :, :2])
                scales[name] = torch.from_numpy(blocks.view(np.float16)[:, :, 0].astype(np.float32))
        return cls(scales, types)

    def codes(self, name: str, weight: Tensor) -> Tensor:
        """Whole numbers, float32 [rows, inputs / 32, 32]."""
        low, high, _ = TYPES[self.types[name]]
        scale = self.scales[name][:, :, None]
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
        return (weight.reshape(len(weight), -1, BLOCK) * inverse).round().clamp(low, high)

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """The weight as the format keeps it, float32; weights without scales come back as they are."""
        if name not in self.scales:
            return weight
        return (self.codes(name, weight) * self.scales[name][:, :, None]).reshape(weight.shape)

    def packed(self, name: str, weight: Tensor) -> np.ndarray:
        """The format's bytes, uint8 [rows, row_bytes], of exactly the values of `__call__`."""
        codes = self.codes(name, weight).numpy().astype(np.int8)
        scales = self.scales[name].numpy().astype(np.float16)[:, :, None].view(np.uint8)
        if self.types[name] == "Q4_0":
            nibbles = (codes + 8).astype(np.uint8)
            body = nibbles[:, :, : BLOCK // 2] | nibbles[:, :, BLOCK // 2 :] << 4
        else:
            body = codes.view(np.uint8)
        return np.concatenate((scales, body), axis=2).reshape(len(weight), -1)

    def save(self, path: pathlib.Path) -> None:
        save_file(self.scales, path, self.types)

    @classmethod
    def load(cls, path: pathlib.Path) -> Rounding:
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            types = dict(file.metadata())
        return cls(load_file(path), types)


def input_squares(network: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """Mean squares of what each matrix is applied to, float32 [inputs] by weight name, over tokens int64 [B, T]. The
    embedding is weighed as the head that it is too."""
    sums: dict[str, Tensor] = {}
    count = 0

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(watch(f"{name}.weight"))
               for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = "embedding" if getattr(network, "head", None) is None else "head"
    try:
        with torch.no_grad():
            for tokens in batches:
                hidden = network.hidden(tokens).float().flatten(0, 1)
                sums[head] = sums.get(head, torch.zeros(hidden.shape[1])) + hidden.square().sum(0)
                count += len(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / count).numpy() for name, total in sums.items()}
