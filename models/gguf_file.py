"""A GGUF file, mapped into memory: metadata, tensor table, and read-only views of tensor bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Everything is
checked when the file is opened; after that no offset of the file can lead outside it.
"""
from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edge_runtime.errors import CorruptModelError, ModelNotFoundError
from edge_runtime.models.gguf_metadata import MAX_KEYS, Cursor, Metadata, read_metadata
from edge_runtime.models.unsupported import unsupported
from edge_runtime.quant.dequantize import dequantize
from edge_runtime.quant.formats import FORMATS, FORMATS_BY_NUMBER, OTHER_FORMATS_BY_NUMBER, BlockFormat

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LATER_VERSIONS = range(4, 16)  # a version in here is news, one above is noise
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20  # the format wants multiples of 8
MAX_TENSORS = 1 << 17
MAX_TENSOR_NAME = 255  # llama.cpp stops at 63
MAX_DIMS = 4
KNOWN_TYPE_NUMBERS = 128  # ggml's enum stands at 40; a number above this is no type of any version
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimension count, one dimension, type, offset
MIN_PAIR_BYTES = 8 + 1 + 4 + 1


@dataclass(frozen=True)
class TensorInfo:
    """shape: in NumPy order (rows, inputs). type: a name of quant.formats.FORMATS. offset: from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def format(self) -> BlockFormat:
        return FORMATS[self.type]

    @property
    def size(self) -> int:
        """Weights."""
        return math.prod(self.shape)


class GGUFFile:
    """An open GGUF file.

    ModelNotFoundError: there is no such file, or it is not a file. CorruptModelError: it breaks the format, with the
    byte. UnsupportedModelError: a version, byte order or tensor type that is not read here.
    The file must not shrink while it is open: to touch a mapped page that is gone ends the process, on any system.
    """

    metadata: Metadata
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._map, self.file_size = _map_file(self.path)
        try:
            self._parse(Cursor(self._map, self.file_size, self.path))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.tensors)} tensors, {self.file_size} bytes)"

    def close(self) -> None:
        """Unmaps the file. Views that `data` handed out stay valid: the mapping ends with the last of them."""
        if hasattr(self, "metadata"):
            self.metadata.detach()
        if self._map is not None:
            with contextlib.suppress(BufferError):  # views are alive
                self._map.close()
            self._map = None

    @property
    def closed(self) -> bool:
        return self._map is None

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [nbytes], read-only, straight from the mapped file. KeyError: no such tensor."""
        info = self.tensors[name]
        return np.frombuffer(self._mapping(), np.uint8, info.nbytes, info.offset)

    def floats(self, name: str) -> np.ndarray:
        """The weights of a tensor, float32 of its shape, a copy."""
        info = self.tensors[name]
        return dequantize(self.data(name), info.format, info.shape)

    def release(self, name: str) -> None:
        """Gives back the resident pages that lie wholly inside a tensor. They are read from disk again when touched."""
        info = self.tensors[name]
        page = mmap.PAGESIZE
        first = -(-info.offset // page) * page
        last = (info.offset + info.nbytes) // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping().madvise(mmap.MADV_DONTNEED, first, last - first)

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map

    def _parse(self, cursor: Cursor) -> None:
        self.version = _version(cursor)
        tensors_at = cursor.at
        tensor_count = cursor.u64("the tensor count")
        pairs_at = cursor.at
        pair_count = cursor.u64("the metadata count")
        _bound(cursor, tensors_at, "tensors", tensor_count, MIN_TENSOR_BYTES, MAX_TENSORS)
        _bound(cursor, pairs_at, "metadata pairs", pair_count, MIN_PAIR_BYTES, MAX_KEYS)
        self.metadata = read_metadata(cursor, pair_count)
        self.alignment = _alignment(cursor, self.metadata)
        self.tensors, self.data_start = _tensor_table(cursor, tensor_count, self.alignment)


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(path, "there is no such file") from error
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise ModelNotFoundError(path, f"that leads to no file: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise ModelNotFoundError(repr(str(path)), "that is no file name") from error
    if stat.S_ISDIR(mode):
        raise ModelNotFoundError(path, "that is a folder")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
        raise ModelNotFoundError(path, "that is a pipe or a device")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CorruptModelError(path, 0, "the file is empty")
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), size


def _version(cursor: Cursor) -> int:
    magic = bytes(cursor.buffer[:4])
    if magic != MAGIC:
        cursor.corrupt(0, f"not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    cursor.at = 4
    version = cursor.u32("the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in range(1, LATER_VERSIONS.stop):
        raise unsupported("a big-endian GGUF file", ("little-endian",))
    if version == 1 or version in LATER_VERSIONS:
        raise unsupported(f"GGUF version {version}", tuple(map(str, VERSIONS)))
    cursor.corrupt(4, f"{version} is no GGUF version")


def _bound(cursor: Cursor, at: int, what: str, count: int, least: int, limit: int) -> None:
    if count > cursor.left // least:
        cursor.corrupt(at, f"{count} {what} cannot fit into the {cursor.left} bytes that follow")
    if count > limit:
        cursor.corrupt(at, f"{count} {what}: the limit is {limit}")


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value, at = metadata[key], metadata.offset(key)
    if metadata.type_name(key) not in ("uint32", "uint64", "int32", "int64", "uint16", "uint8"):
        cursor.corrupt(at, f"{key} is of type {metadata.type_name(key)}, not uint32")
    if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
        cursor.corrupt(at, f"{key} is {value}, not a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}")
    return value


def _tensor_table(cursor: Cursor, count: int, alignment: int) -> tuple[dict[str, TensorInfo], int]:
    """The table, and the byte where the tensors' data begins."""
    entries: dict[str, tuple[tuple[int, ...], BlockFormat, int, int, int]] = {}
    for index in range(count):
        start = cursor.at
        name = cursor.string(f"the name of tensor {index}", MAX_TENSOR_NAME)
        if not name:
            cursor.corrupt(start, f"tensor {index} has no name")
        if name in entries:
            cursor.corrupt(start, f"tensor {name!r} appears twice")
        entries[name] = _tensor_entry(cursor, name, alignment)
    data_start = -(-cursor.at // alignment) * alignment
    for name, (_, _, offset, nbytes, offset_at) in entries.items():
        if data_start + offset + nbytes > cursor.size:
            cursor.corrupt(offset_at, f"tensor {name!r} ends at byte {data_start + offset + nbytes}, "
                                      f"the file at {cursor.size}")
    _refuse_overlaps(cursor, entries)
    tensors = {}
    for name, (shape, kind, offset, nbytes, _) in entries.items():
        if kind.name not in FORMATS:
            raise unsupported(f"tensor type {kind.name} (of {name!r})", tuple(FORMATS))
        tensors[name] = TensorInfo(name, shape, kind.name, data_start + offset, nbytes)
    return tensors, data_start


def _tensor_entry(cursor: Cursor, name: str, alignment: int) -> tuple[Any, ...]:
    """(shape, type, offset in the data section, bytes, where the offset stands) of the entry at the cursor."""
    dims_at = cursor.at
    n_dims = cursor.u32(f"the dimension count of {name!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.corrupt(dims_at, f"tensor {name!r} has {n_dims} dimensions, not 1 to {MAX_DIMS}")
    dims_at = cursor.at
    dims = [cursor.u64(f"a dimension of {name!r}") for _ in range(n_dims)]
    type_at = cursor.at
    number = cursor.u32(f"the type of {name!r}")
    offset_at = cursor.at
    offset = cursor.u64(f"the offset of {name!r}")
    if 0 in dims:
        cursor.corrupt(dims_at + 8 * dims.index(0), f"tensor {name!r} has a dimension of 0")
    weights = math.prod(dims)
    if weights >= 1 << 63:
        cursor.corrupt(dims_at, f"the dimensions of tensor {name!r} overflow: {' x '.join(map(str, dims))}")
    kind = FORMATS_BY_NUMBER.get(number) or OTHER_FORMATS_BY_NUMBER.get(number)
    if kind is None:
        if number < KNOWN_TYPE_NUMBERS:
            raise unsupported(f"tensor type number {number} (of {name!r})", tuple(FORMATS))
        cursor.corrupt(type_at, f"tensor {name!r} has the unknown type {number}")
    if dims[0] % kind.block_size:
        cursor.corrupt(dims_at, f"tensor {name!r} has rows of {dims[0]}, not a multiple of the {kind.name} block of "
                                f"{kind.block_size}")
    nbytes = weights // kind.block_size * kind.block_bytes
    if nbytes > cursor.size:
        cursor.corrupt(dims_at, f"tensor {name!r} takes {nbytes} bytes, the file has {cursor.size}")
    if offset % alignment:
        cursor.corrupt(offset_at, f"the offset {offset} of tensor {name!r} is not a multiple of {alignment}")
    return tuple(reversed(dims)), kind, offset, nbytes, offset_at


def _refuse_overlaps(cursor: Cursor, entries: dict[str, tuple[Any, ...]]) -> None:
    end, before = 0, ""
    for name, (_, _, offset, nbytes, offset_at) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if offset < end:
            cursor.corrupt(offset_at, f"tensor {name!r} overlaps {before!r}")
        end, before = offset + nbytes, name
