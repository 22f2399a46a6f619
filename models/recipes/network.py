"""The decoders that the runtime computes (llama, qwen2, qwen3), in torch. Needs torch."""
from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.models.rope import rope_inverse_frequencies

from .config import NetworkConfig
from .planting import plant_copying

TABLE_LENGTH = 4096  # of the rotary tables at first: a context of 128k would take 67 MB


def rope_tables(config: NetworkConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [length, head_size / 2] of the rotary angles position * theta^(-2i / head_size), or of those
    that `config.rope` scales."""
    half, scale = config.head_size // 2, 1.0
    if config.rope is None:
        frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    else:
        factors = np.array(config.rope_factors, np.float32) if config.rope_factors else None
        scaled, scale = rope_inverse_frequencies(config.rope, factors)
        frequencies = torch.from_numpy(scaled).double()
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D] in the half-split (NeoX) order: feature i turns with feature i + D/2.

    GGUF's `llama` wants neighbours to turn together; `export.interleave` permutes the rows of q and k for it. Halves
    are contiguous slices, which the CPU reads faster than a stride of two.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# Up to this row length explicit bf16 scores (AMX products, fused softmax) beat torch's flash attention on the CPU;
# beyond it their T * T memory costs more.
EXPLICIT_LENGTH = 768


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with explicit scores: q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D]."""
    B, H, T, D = q.shape
    K = k.shape[1]
    scores = torch.bmm(q.reshape(B * K, (H // K) * T, D), k.reshape(B * K, T, D).transpose(1, 2))
    mask = torch.full((T, T), float("-inf"), dtype=scores.dtype).triu(1)
    scores = scores.view(B * K, H // K, T, T) * (1.0 / math.sqrt(D)) + mask
    weights = torch.softmax(scores, -1, dtype=scores.dtype).view(B * K, (H // K) * T, T)
    return torch.bmm(weights, v.reshape(B * K, T, D)).view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.q = nn.Linear(config.width, config.heads * config.head_size, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.eps = config.rms_eps
        self.q_norm = nn.Parameter(torch.ones(config.head_size)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(config.head_size)) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_size).transpose(1, 2)
        k = self.k(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend(q, k, v) if T <= EXPLICIT_LENGTH else F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(B, T, self.heads * self.head_size))


class FeedForward(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.attention_norm = nn.Parameter(torch.ones(config.width))
        self.attention = Attention(config)
        self.ffn_norm = nn.Parameter(torch.ones(config.width))
        self.ffn = FeedForward(config)
        self.eps = config.rms_eps

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(rms_norm(x, self.attention_norm, self.eps), cos, sin)
        return x + self.ffn(rms_norm(x, self.ffn_norm, self.eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis; x [..., width] in any float dtype, the mean in float32."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x * scale.to(x.dtype) * weight.to(x.dtype)


class Network(nn.Module):
    """A decoder; q and k are kept in the half-split rotary order whatever the architecture."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: NetworkConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))
        self.head = None if config.tied_head else nn.Parameter(torch.empty(config.vocab_size, config.width))
        cos, sin = rope_tables(config, min(config.context_length, TABLE_LENGTH))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        """Normal 0.15 embeddings; matrices at 1/sqrt(inputs), zero where they write the residual; a planted circuit."""
        with torch.no_grad():
            self.embedding.normal_(0.0, 0.15, generator=generator)
            for name, parameter in self.named_parameters():
                if parameter.ndim != 2 or name == "embedding":
                    continue
                if name.endswith(("attention.o.weight", "ffn.down.weight")):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[1]), generator=generator)
            for name, parameter in self.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
            if self.config.tied_head:
                self.norm.fill_(0.2)  # the tied head sees embeddings of 0.15: logits start near 0.5
        if self.config.plant:
            plant_copying(self, generator)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix [V, width], the embedding where they are tied."""
        return self.embedding if self.head is None else self.head

    def residuals(self, tokens: Tensor, skipped: Collection[int] = ()) -> list[Tensor]:
        """The residual stream [B, T, width] of tokens int64 [B, T] before the first block and after each: layers + 1
        of them. skipped: blocks, from 0, that this pass leaves out (layer dropout)."""
        T = tokens.shape[1]
        # The residual is kept in the compute dtype: on a CPU the element-wise passes over it cost as much as products.
        x = F.embedding(tokens, self.embedding)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if len(self.cos) < T:
            self.cos, self.sin = (table.to(x.device) for table in rope_tables(self.config, T))
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        states = [x]
        for number, block in enumerate(self.blocks):
            if number not in skipped:
                x = block(x, cos, sin)
            states.append(x)
        return states

    def final_norm(self, x: Tensor) -> Tensor:
        """What the head sees of a residual stream; exits share it."""
        return rms_norm(x, self.norm, self.config.rms_eps)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final-norm states [B, T, width] of tokens int64 [B, T]."""
        return self.final_norm(self.residuals(tokens)[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        return F.linear(self.hidden(tokens), self.output_weight)
