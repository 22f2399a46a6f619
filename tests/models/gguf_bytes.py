"""GGUF files written byte by byte, with the places of all fields, so that tests can break one and name its offset."""
from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

UINT8, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 5, 4, 6, 7, 8, 9, 10
CODES = {UINT8: "B", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B", UINT64: "Q"}


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(raw: str | bytes) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return u64(len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    """Type number and value."""
    return u32(kind) + (text(value) if kind == STRING else struct.pack("<" + CODES[kind], value))


def array(kind: int, values: list[Any], count: int | None = None) -> bytes:
    """Type number, element type, count and elements. Elements of arrays are bytes: element type, count, elements."""
    parts = [value if kind == ARRAY else text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)
             for value in values]  # fmt: skip
    return u32(ARRAY) + u32(kind) + u64(len(values) if count is None else count) + b"".join(parts)


ARCHITECTURE: tuple[str | bytes, bytes] = ("general.architecture", scalar(STRING, "llama"))


@dataclass
class Draft:
    """Fields of a file; `build` gives the bytes and fills `places`: "tensor_count", "pair_count", "key:K", "type:K",
    "value:K", "tensor:T", "n_dims:T", "dims:T", "dtype:T", "offset:T", "data"."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[tuple[str | bytes, bytes]] = field(default_factory=lambda: [ARCHITECTURE])
    tensors: list[tuple[str | bytes, list[int], int, int]] = field(default_factory=lambda: [("a", [32], 0, 0)])
    tensor_count: int | None = None
    pair_count: int | None = None
    n_dims: int | None = None
    data_bytes: int = 4096
    alignment: int = 32
    places: dict[str, int] = field(default_factory=dict)

    def build(self) -> bytes:
        out = bytearray(self.magic + u32(self.version))

        def put(place: str, raw: bytes) -> None:
            self.places.setdefault(place, len(out))
            out.extend(raw)

        put("tensor_count", u64(len(self.tensors) if self.tensor_count is None else self.tensor_count))
        put("pair_count", u64(len(self.pairs) if self.pair_count is None else self.pair_count))
        for index, (key, value) in enumerate(self.pairs):
            name = key if isinstance(key, str) and f"key:{key}" not in self.places else index
            put(f"key:{name}", text(key))
            put(f"type:{name}", value[:4])
            put(f"value:{name}", value[4:])
        for index, (tensor, dims, kind, offset) in enumerate(self.tensors):
            name = tensor if isinstance(tensor, str) and f"tensor:{tensor}" not in self.places else index
            put(f"tensor:{name}", text(tensor))
            put(f"n_dims:{name}", u32(len(dims) if self.n_dims is None else self.n_dims))
            put(f"dims:{name}", b"".join(u64(dim) for dim in dims))
            put(f"dtype:{name}", u32(kind))
            put(f"offset:{name}", u64(offset))
        out.extend(b"\0" * (-len(out) % self.alignment))
        put("data", bytes(self.data_bytes))
        return bytes(out)
