"""What tensors are called in a GGUF file (llama.cpp's names, architectures llama, qwen2 and qwen3)."""
from __future__ import annotations

from dataclasses import dataclass

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class LayerNames:
    """Names of one layer's tensors. Shapes: H heads, K kv heads, D head size, W width, F ffn."""

    attn_norm: str  # [W]
    q: str  # [H * D, W]
    k: str  # [K * D, W]
    v: str  # [K * D, W]
    o: str  # [W, H * D]
    q_bias: str  # [H * D]
    k_bias: str  # [K * D]
    v_bias: str  # [K * D]
    q_norm: str  # [D]
    k_norm: str  # [D]
    ffn_norm: str  # [W]
    gate: str  # [F, W]
    up: str  # [F, W]
    down: str  # [W, F]


def layer_names(layer: int) -> LayerNames:
    p = f"blk.{layer}."
    return LayerNames(
        attn_norm=p + "attn_norm.weight",
        q=p + "attn_q.weight",
        k=p + "attn_k.weight",
        v=p + "attn_v.weight",
        o=p + "attn_output.weight",
        q_bias=p + "attn_q.bias",
        k_bias=p + "attn_k.bias",
        v_bias=p + "attn_v.bias",
        q_norm=p + "attn_q_norm.weight",
        k_norm=p + "attn_k_norm.weight",
        ffn_norm=p + "ffn_norm.weight",
        gate=p + "ffn_gate.weight",
        up=p + "ffn_up.weight",
        down=p + "ffn_down.weight",
    )
