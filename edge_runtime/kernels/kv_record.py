"""How the KV of 64 tokens of one (layer, kv head) lies in memory: one contiguous record.

Token t stands in column t % 4, lane t // 4, so that 16 lanes of a vector score 16 tokens and the four columns of a
lane are the four values that one dot instruction sums. Dp is the head size D padded to a multiple of 16 with zeros.

    int8   K   [4 columns][Dp / 4][16 lanes][4 dims] int8     code * k_scale[token]
           V   [16 lanes][Dp][4 columns] int8                 code * v_scale[token]
           k_scale, v_scale   [4 columns][16 lanes] float32   largest magnitude of the token's head / 127
    fp16   K   [4 columns][Dp][16 lanes] float16
           V   [64 tokens][Dp] float16
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

TOKENS = 64
COLUMNS, LANES = 4, 16
KV_DTYPES = ("int8", "fp16")
PAGE_SOURCES = ("attention_math.py", "attention_block.py", "attention_prefetch.py", "attention_softmax.py",
                "attention_pages.py")


def padded_head(head_size: int) -> int:
    """The head size, padded to whole vectors."""
    return -(-head_size // LANES) * LANES


def record_bytes(dtype: str, head_size: int) -> int:
    """Bytes of a record, a multiple of 64. ValueError for an unknown dtype."""
    if dtype not in KV_DTYPES:
        raise ValueError(f"KV dtype {dtype!r}: must be one of {', '.join(KV_DTYPES)}")
    values = 2 * TOKENS * padded_head(head_size)
    return values + 2 * TOKENS * 4 if dtype == "int8" else 2 * values


@dataclass(frozen=True)
class RecordLayout:
    """Byte offsets inside a record."""

    dtype: str
    head_size: int

    @property
    def padded(self) -> int:
        return padded_head(self.head_size)

    @property
    def int8(self) -> bool:
        return self.dtype == "int8"

    @property
    def bytes(self) -> int:
        return record_bytes(self.dtype, self.head_size)

    @property
    def column_bytes(self) -> int:
        """Between two columns of K."""
        return LANES * self.padded * (1 if self.int8 else 2)

    @property
    def v_at(self) -> int:
        return COLUMNS * self.column_bytes

    @property
    def k_scale_at(self) -> int:
        return 2 * TOKENS * self.padded

    @property
    def v_scale_at(self) -> int:
        return self.k_scale_at + TOKENS * 4


def sources_digest(*files: str) -> str:
    """Hash of kernel sources beside this file: part of the names of kernels that are built from several files."""
    digest = hashlib.blake2b(digest_size=5)
    for file in ("kv_record.py", *files):
        digest.update((Path(__file__).parent / file).read_bytes())
    return digest.hexdigest()
