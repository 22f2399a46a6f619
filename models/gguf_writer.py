"""Writes GGUF files: header, metadata and tensors in one pass, under the final name only when complete.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""
from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.gguf_file import DEFAULT_ALIGNMENT, MAGIC
from edge_runtime.models.gguf_metadata import ARRAY, BOOL, SCALARS, STRING
from edge_runtime.quant.formats import BlockFormat, block_format

UINT32, INT32, FLOAT32, UINT64, INT64 = 4, 5, 6, 10, 11
_NUMBERS = {dtype.str.lstrip("|"): number for number, (_, dtype) in SCALARS.items() if number != BOOL}


@dataclass(frozen=True)
class RawValue:
    """A metadata value that is written as it is: type number and bytes, as `Metadata.raw` gives them."""

    data: bytes


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write. chunks: gives its bytes in order, in pieces of any size; called once, when they are due."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    chunks: Callable[[], Iterable[np.ndarray | bytes]]

    @property
    def nbytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * self.format.row_bytes(self.shape[-1])


def array_tensor(name: str, data: np.ndarray, format: str | BlockFormat = "F32",
                 shape: Sequence[int] | None = None) -> TensorSource:  # fmt: skip
    """A tensor in memory: float32 data for F32, or the blocks of `format` with the shape they stand for."""
    shape = tuple(shape if shape is not None else data.shape)
    return TensorSource(name, shape, block_format(format), lambda: [np.ascontiguousarray(data)])


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Sequence[TensorSource]) -> Path:
    """Writes the file and returns its path. An existing file is replaced when the new one is complete, not before.

    metadata: str, bool, int (the smallest of uint32, int32, uint64, int64 that holds it), float (float32), lists of
    one of these, NumPy arrays (by their dtype), RawValue. ValueError for values that GGUF cannot hold, and for chunks
    that do not add up to the size of their tensor.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise InvalidRequestError("path", str(path), "a file, not a folder or a device")
    alignment = DEFAULT_ALIGNMENT
    pairs = b"".join(_string(key) + encode_value(value) for key, value in metadata.items()
                     if key != "general.alignment")  # fmt: skip
    pair_count = len(metadata) - ("general.alignment" in metadata)
    table, at = b"", 0
    for tensor in tensors:
        dims = b"".join(struct.pack("<Q", dim) for dim in reversed(tensor.shape))
        table += _string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims
        table += struct.pack("<IQ", tensor.format.ggml_type, at)
        at += -(-tensor.nbytes // alignment) * alignment
    header = MAGIC + struct.pack("<IQQ", 3, len(tensors), pair_count)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(header + pairs + table)
            _pad(out, alignment)
            for tensor in tensors:
                _write_tensor(out, tensor)
                _pad(out, alignment)
            out.flush()
            os.fsync(out.fileno())
        _inherit_mode(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _inherit_mode(path: str) -> None:
    """The mode of a file made by open(): mkstemp's is for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(b"\0" * (-out.tell() % alignment))


def _write_tensor(out: BinaryIO, tensor: TensorSource) -> None:
    start = out.tell()
    for chunk in tensor.chunks():
        out.write(chunk if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).data.cast("B"))
    written = out.tell() - start
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes for a {tensor.format.name} tensor of {tensor.nbytes}")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def encode_value(value: Any) -> bytes:
    """A metadata value as GGUF holds it: the number of its type, then its bytes."""
    if isinstance(value, RawValue):
        return value.data
    if isinstance(value, np.ndarray):
        return struct.pack("<I", ARRAY) + _encode_array(value)
    if isinstance(value, (list, tuple)):
        return struct.pack("<I", ARRAY) + _encode_list(list(value))
    if isinstance(value, np.generic):
        value = value.item()
    number, payload = _encode_scalar(value)
    return struct.pack("<I", number) + payload


def _encode_scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, bytes([value])
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, int):
        number = _integer_type(value, value)
        return number, SCALARS[number][0].pack(value)
    raise ValueError(f"GGUF metadata cannot hold a {type(value).__name__}")


def _integer_type(low: int, high: int) -> int:
    for number, least, most in ((UINT32, 0, 1 << 32), (INT32, -1 << 31, 1 << 31), (UINT64, 0, 1 << 64),
                                (INT64, -1 << 63, 1 << 63)):  # fmt: skip
        if least <= low and high < most:
            return number
    raise ValueError(f"GGUF metadata cannot hold integers from {low} to {high}")


def _encode_array(values: np.ndarray) -> bytes:
    flat = values.reshape(-1)
    if flat.dtype == np.bool_:
        return struct.pack("<IQ", BOOL, flat.size) + flat.astype(np.uint8).tobytes()
    little = flat.astype(flat.dtype.newbyteorder("<"))
    number = _NUMBERS.get(little.dtype.str.lstrip("|"))
    if number is None:
        raise ValueError(f"GGUF metadata cannot hold an array of {values.dtype}")
    return struct.pack("<IQ", number, flat.size) + little.tobytes()


def _encode_list(values: list[Any]) -> bytes:
    if not values:
        return struct.pack("<IQ", UINT32, 0)
    if all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    if all(isinstance(value, bool) for value in values):
        return _encode_array(np.array(values, np.bool_))
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        number = _integer_type(min(values), max(values))
        return _encode_array(np.array(values, SCALARS[number][1]))
    if all(isinstance(value, float) for value in values):
        return _encode_array(np.array(values, np.float32))
    raise ValueError("GGUF metadata lists hold strings, whole numbers, floats or bools, one kind at a time")
