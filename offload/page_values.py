"""What lies in a sequence's pages, as numbers: for copies to a device."""
from __future__ import annotations

import ctypes

import numpy as np

from edge_runtime.devices.base import PAGE_TOKENS, KVLayout
from edge_runtime.kernels.kv_record import COLUMNS, LANES, RecordLayout


def read_pages(pages: np.ndarray, layout: KVLayout, start: int, stop: int, layers: range | None = None) -> np.ndarray:
    """Keys (after RoPE) and values of tokens start .. stop - 1 of the sequence with these page addresses, float32
    [layers, 2, K, stop - start, D]: a copy, laid out as `accelerator.DeviceKV` reads and writes it."""
    layers = range(layout.layers) if layers is None else layers
    out = np.empty((len(layers), 2, layout.kv_heads, stop - start, layout.head_size), np.float32)
    first, last = start // PAGE_TOKENS, -(-stop // PAGE_TOKENS)
    for page in range(first, last):
        low, high = max(start, page * PAGE_TOKENS), min(stop, (page + 1) * PAGE_TOKENS)
        inside, to = slice(low % PAGE_TOKENS, high - page * PAGE_TOKENS), slice(low - start, high - start)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * layout.page_bytes).from_address(int(pages[page])))
        records = raw.reshape(layout.layers, layout.kv_heads, layout.record_bytes)[layers.start:layers.stop]
        for part, values in enumerate(_unpack(records, layout)):
            out[:, part, :, to] = values[:, :, inside, :layout.head_size]
    return out


def _unpack(records: np.ndarray, layout: KVLayout) -> tuple[np.ndarray, np.ndarray]:
    """Records uint8 [layers, K, bytes] to keys and values [layers, K, 64, Dp]; see kernels.kv_record."""
    record, lead, size = RecordLayout(layout.dtype, layout.head_size), records.shape[:2], layout.padded_head_size
    k, v = records[..., :record.v_at], records[..., record.v_at:2 * record.v_at]
    if not record.int8:
        keys = k.view(np.float16).reshape(*lead, COLUMNS, size, LANES)
        return (keys.transpose(0, 1, 4, 2, 3).reshape(*lead, PAGE_TOKENS, size),
                v.view(np.float16).reshape(*lead, PAGE_TOKENS, size))
    codes = k.view(np.int8).reshape(*lead, COLUMNS, size // 4, LANES, 4).transpose(0, 1, 4, 2, 3, 5)
    values = v.view(np.int8).reshape(*lead, LANES, size, COLUMNS).transpose(0, 1, 2, 4, 3)
    scales = records[..., record.k_scale_at:record.v_scale_at + PAGE_TOKENS * 4].view(np.float32)
    scales = scales.reshape(*lead, 2, COLUMNS, LANES).transpose(2, 0, 1, 4, 3).reshape(2, *lead, PAGE_TOKENS, 1)
    return codes.reshape(*lead, PAGE_TOKENS, size) * scales[0], values.reshape(*lead, PAGE_TOKENS, size) * scales[1]
