"""The float32 forward pass in plain NumPy: slow, obvious, and what every kernel is compared with."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.models.config import ModelConfig, config_from_gguf, rope_factors
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, layer_names
from edge_runtime.models.rope import rope_inverse_frequencies


@dataclass(frozen=True)
class LayerWeights:
    """float32, rows first: a matrix [outputs, inputs] is applied as `x @ matrix.T`."""

    attn_norm: np.ndarray  # [W]
    q: np.ndarray  # [H * D, W]
    k: np.ndarray  # [K * D, W]
    v: np.ndarray  # [K * D, W]
    o: np.ndarray  # [W, H * D]
    ffn_norm: np.ndarray  # [W]
    gate: np.ndarray  # [F, W]
    up: np.ndarray  # [F, W]
    down: np.ndarray  # [W, F]
    q_bias: np.ndarray | None = None  # [H * D]
    k_bias: np.ndarray | None = None  # [K * D]
    v_bias: np.ndarray | None = None  # [K * D]
    q_norm: np.ndarray | None = None  # [D]
    k_norm: np.ndarray | None = None  # [D]


@dataclass(frozen=True)
class Trace:
    """What a forward pass saw. hidden: float32 [L + 1, T, W], the residual stream before the first layer and after
    each. keys (after RoPE), values: float32 [L, T, K, D]. normed: float32 [T, W], after the final norm. logits:
    float32 [T, V]."""

    hidden: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    normed: np.ndarray
    logits: np.ndarray


class ReferenceModel:
    """A whole model as float32 matrices."""

    def __init__(self, config: ModelConfig, embedding: np.ndarray, layers: Sequence[LayerWeights],
                 output_norm: np.ndarray, head: np.ndarray, factors: np.ndarray | None = None):  # fmt: skip
        self.config, self.embedding, self.layers = config, embedding, tuple(layers)
        self.output_norm, self.head = output_norm, head
        self.inverse_frequencies, self.rope_scale = rope_inverse_frequencies(config.rope, factors)

    @classmethod
    def load(cls, file: GGUFFile) -> ReferenceModel:
        """Dequantizes every tensor: four bytes a weight."""
        config = config_from_gguf(file)
        embedding = file.floats(EMBEDDING)
        return cls(
            config,
            embedding,
            [_load_layer(file, layer) for layer in range(config.layers)],
            file.floats(OUTPUT_NORM),
            embedding if config.tied_head else file.floats(HEAD),
            rope_factors(file, config),
        )

    def forward(self, token_ids: Sequence[int] | np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """Logits of one causal sequence, float32 [T, V]. positions: int [T], 0 to T - 1 unless given."""
        return self.trace(token_ids, positions).logits

    def trace(self, token_ids: Sequence[int] | np.ndarray, positions: np.ndarray | None = None,
              layers: int | None = None, exits: np.ndarray | None = None) -> Trace:  # fmt: skip
        """The forward pass with everything a kernel test wants to see. layers: stop after that many. exits: int [T],
        layers after which each row leaves: the layers above take K and V of the state that left.

        IndexError for a token id outside the vocabulary.
        """
        ids = np.asarray(token_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise IndexError(f"token ids must lie within 0 and {self.config.vocab_size - 1}")
        places = np.arange(len(ids)) if positions is None else np.asarray(positions)
        x = self.embedding[ids]
        hidden, keys, values = [x], [], []
        for number, layer in enumerate(self.layers[:layers]):
            before = x
            attended, k, v = self.attention(layer, rms_norm(x, layer.attn_norm, self.config.rms_eps), places)
            x = x + attended
            normed = rms_norm(x, layer.ffn_norm, self.config.rms_eps)
            x = x + (silu(normed @ layer.gate.T) * (normed @ layer.up.T)) @ layer.down.T
            if exits is not None:
                x = np.where(np.asarray(exits)[:, None] <= number, before, x)
            hidden.append(x)
            keys.append(k)
            values.append(v)
        normed = rms_norm(x, self.output_norm, self.config.rms_eps)
        return Trace(np.stack(hidden), np.stack(keys), np.stack(values), normed, normed @ self.head.T)

    def attention(self, layer: LayerWeights, x: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """x: float32 [T, W], normed. Returns the output [T, W], and keys after RoPE and values, both [T, K, D]."""
        c = self.config
        q, k, v = x @ layer.q.T, x @ layer.k.T, x @ layer.v.T
        if layer.q_bias is not None:
            q, k, v = q + layer.q_bias, k + layer.k_bias, v + layer.v_bias
        q = q.reshape(-1, c.heads, c.head_size)
        k = k.reshape(-1, c.kv_heads, c.head_size)
        v = v.reshape(-1, c.kv_heads, c.head_size)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, c.rms_eps), rms_norm(k, layer.k_norm, c.rms_eps)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        later = np.arange(len(x))[None, :] > np.arange(len(x))[:, None]
        out = np.empty_like(q)
        for head in range(c.heads):
            scores = q[:, head] @ k[:, head // c.group].T * np.float32(c.head_size**-0.5)
            out[:, head] = softmax(np.where(later, np.float32(-np.inf), scores)) @ v[:, head // c.group]
        return out.reshape(len(x), -1) @ layer.o.T, k, v

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """RoPE on float32 [T, heads, D]."""
        angles = positions[:, None].astype(np.float64) * self.inverse_frequencies
        cos = (np.cos(angles) * self.rope_scale).astype(np.float32)[:, None]
        sin = (np.sin(angles) * self.rope_scale).astype(np.float32)[:, None]
        if self.config.rope.style == "norm":
            a, b = x[..., 0::2], x[..., 1::2]
            return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(np.minimum(-x, np.float32(80))))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _load_layer(file: GGUFFile, layer: int) -> LayerWeights:
    names = layer_names(layer)
    return LayerWeights(**{field: file.floats(name) for field, name in vars(names).items() if name in file.tensors})
