"""Slow, obvious NumPy versions of RoPE, KV records and attention: what the kernels are compared with."""
from __future__ import annotations

import numpy as np

from edge_runtime.kernels.kv_record import COLUMNS, LANES, TOKENS, RecordLayout


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., D] -> int8 codes [..., D] and float32 scales [...]: largest magnitude / 127 per vector."""
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    return np.rint(x * inverse[..., None]).astype(np.int8), largest * np.float32(1 / 127)


def write_token(record: np.ndarray, layout: RecordLayout, token: int, k: np.ndarray, v: np.ndarray) -> None:
    """Key and value float32 [D] of token 0..63 into a record, uint8 [layout.bytes]."""
    size, padded = layout.head_size, layout.padded
    column, lane = token % COLUMNS, token // COLUMNS
    if layout.int8:
        keys = record[:layout.v_at].view(np.int8).reshape(COLUMNS, padded // 4, LANES, 4)
        values = record[layout.v_at:layout.k_scale_at].view(np.int8).reshape(LANES, padded, COLUMNS)
        scales = record[layout.k_scale_at:].view(np.float32).reshape(2, COLUMNS, LANES)
        code, scales[0, column, lane] = quantize(k)
        keys[column, :, lane] = np.pad(code, (0, padded - size)).reshape(-1, 4)
        code, scales[1, column, lane] = quantize(v)
        values[lane, :, column] = np.pad(code, (0, padded - size))
    else:
        half_keys = record[:layout.v_at].view(np.float16).reshape(COLUMNS, padded, LANES)
        half_values = record[layout.v_at:].view(np.float16).reshape(TOKENS, padded)
        half_keys[column, :, lane] = np.pad(k, (0, padded - size))
        half_values[token] = np.pad(v, (0, padded - size))


def unpack(record: np.ndarray, layout: RecordLayout) -> tuple[np.ndarray, np.ndarray]:
    """A record, uint8 [layout.bytes] -> K, V float32 [64, D] as the kernels see them."""
    padded = layout.padded
    if layout.int8:
        keys = record[:layout.v_at].view(np.int8).reshape(COLUMNS, padded // 4, LANES, 4)
        values = record[layout.v_at:layout.k_scale_at].view(np.int8).reshape(LANES, padded, COLUMNS)
        scales = record[layout.k_scale_at:].view(np.float32).reshape(2, COLUMNS, LANES)
        scales = scales.transpose(0, 2, 1).reshape(2, TOKENS, 1)
        k = keys.transpose(2, 0, 1, 3).reshape(TOKENS, padded) * scales[0]
        v = values.transpose(0, 2, 1).reshape(TOKENS, padded) * scales[1]
    else:
        half_keys = record[:layout.v_at].view(np.float16).reshape(COLUMNS, padded, LANES)
        k = half_keys.transpose(2, 0, 1).reshape(TOKENS, padded).astype(np.float32)
        v = record[layout.v_at:].view(np.float16).reshape(TOKENS, padded).astype(np.float32)
    return k[:, :layout.head_size], v[:, :layout.head_size]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of one slice in float64.

    q [rows, H, D]; k, v [T, K, D] with T >= position + rows; row i sees tokens 0..position + i.
    Returns o [rows, H, D] and lse [rows, H] (natural logarithm)."""
    rows, heads, size = q.shape
    group = heads // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("rhd,thd->rht", q.astype(np.float64), k) / np.sqrt(size)
    hidden = np.arange(len(k))[None, :] > position + np.arange(rows)[:, None]
    scores = np.where(hidden[:, None, :], -np.inf, scores)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("rht,thd->rhd", weights / total, v), (top + np.log(total))[..., 0]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., D] / root mean square * weight [D], in float64."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> np.ndarray:
    """RoPE of x [rows, heads, D] with cos, sin [rows, rotary / 2].

    Style "norm" turns the pairs (2i, 2i + 1), "neox" the pairs (i, i + rotary / 2)."""
    half = cos.shape[-1]
    result = np.array(x, np.float64)
    cos, sin = cos[:, None, :].astype(np.float64), sin[:, None, :].astype(np.float64)
    if style == "norm":
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    result[..., first], result[..., second] = a * cos - b * sin, a * sin + b * cos
    return result
