"""The weights of a Hugging Face folder: model.safetensors, or the shards that its index names, mapped into memory.

Format: https://github.com/huggingface/safetensors#format. Every offset is checked when a file is opened.
"""
from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from edge_runtime.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from edge_runtime.quant.dequantize import dequantize

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 4
MAX_INDEX_BYTES = 1 << 28
# The words that float types are read as.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
          "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """shape: rows first. dtype: a name of the format. offset: of its first byte in `path`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    nbytes: int


class SafetensorsFolder:
    """The tensors of a folder, by name.

    ModelNotFoundError: no folder, or no safetensors in it. CorruptModelError: a file breaks the format, with the byte.
    UnsupportedModelError: weights in another kind of file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            for path, wanted in _shards(self.folder).items():
                found = self._open(path)
                for name in found if wanted is None else wanted:
                    if name not in found:
                        raise CorruptModelError(path, 8, f"tensor {name!r}, which the index expects here, is missing")
                    self.tensors[name] = found[name]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def close(self) -> None:
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):  # views are alive
                mapped.close()
        self._maps.clear()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def raw(self, name: str) -> np.ndarray:
        """The words of a float tensor in its shape: uint32 for F32, uint16 for F16 and BF16; read-only, not copied.
        UnsupportedModelError for a tensor of another type."""
        tensor = self.tensors[name]
        if tensor.dtype not in FLOATS:
            raise UnsupportedModelError(f"the type {tensor.dtype} of tensor {name!r}", tuple(FLOATS),
                                        "Quantized safetensors cannot be read: take the float model.")
        count = math.prod(tensor.shape)
        return np.frombuffer(self._maps[tensor.path], FLOATS[tensor.dtype], count, tensor.offset).reshape(tensor.shape)

    def floats(self, name: str) -> np.ndarray:
        """float32, a copy."""
        raw = self.raw(name)
        return dequantize(np.ascontiguousarray(raw).reshape(-1).view(np.uint8), self.tensors[name].dtype, raw.shape)

    def _open(self, path: Path) -> dict[str, StoredTensor]:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CorruptModelError(path, 0, f"a safetensors file of {size} bytes")
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise CorruptModelError(path.parent / INDEX, 0, f"the index names {path.name}, which is missing") from error
        except IsADirectoryError as error:
            raise CorruptModelError(path, 0, "a folder where a file should be") from error
        self._maps[path] = mapped
        return _header(path, mapped, size)


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with a config.json, as Hugging Face's are."""
    return (Path(path) / "config.json").is_file()


def read_json(path: Path, limit: int = MAX_INDEX_BYTES) -> dict[str, Any]:
    """An object. CorruptModelError for anything else, with the byte where reading failed."""
    raw = path.read_bytes() if path.stat().st_size <= limit else None
    if raw is None:
        raise CorruptModelError(path, 0, f"larger than {limit} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorruptModelError(path, error.start, "not UTF-8") from error
    except json.JSONDecodeError as error:
        raise CorruptModelError(path, len(error.doc[:error.pos].encode()), f"not JSON: {error.msg}") from error
    except RecursionError as error:
        raise CorruptModelError(path, 0, "JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise CorruptModelError(path, 0, f"a JSON {type(value).__name__} where an object should be")
    return value


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """File -> names of its tensors that count, or None: all."""
    if not folder.is_dir():
        raise ModelNotFoundError(folder, "there is no such folder")
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")):
            raise UnsupportedModelError(f"a folder with weights in PyTorch's own format ({folder})", ("safetensors",),
                                        "Save the model again with save_pretrained.")
        raise ModelNotFoundError(folder, f"the folder holds neither {SINGLE} nor {INDEX}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CorruptModelError(index, 0, "no weight_map")
    shards: dict[Path, list[str] | None] = {}
    for name, file in places.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise CorruptModelError(index, 0, f"weight_map names {file!r}, which is no file of this folder")
        names = shards.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    return shards


def _header(path: Path, mapped: mmap.mmap, size: int) -> dict[str, StoredTensor]:
    def corrupt(offset: int, reason: str) -> NoReturn:
        raise CorruptModelError(path, offset, reason)

    length = int.from_bytes(mapped[:8], "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        corrupt(0, f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(mapped[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        corrupt(8, f"the header is not JSON ({error})")
    if not isinstance(header, dict):
        corrupt(8, "the header is not an object")
    start = 8 + length
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, nbytes, begin = _entry(name, entry, corrupt)
        if begin + nbytes > size - start:
            corrupt(8, f"tensor {name!r} ends {begin + nbytes - (size - start)} bytes after the file")
        found[name] = StoredTensor(name, shape, entry["dtype"], path, start + begin, nbytes)
    return found


def _entry(name: str, entry: Any, corrupt: Any) -> tuple[tuple[int, ...], int, int]:
    """(shape, bytes, first byte after the header) of a tensor in the header."""
    if not isinstance(entry, Mapping):
        corrupt(8, f"tensor {name!r} has no object in the header")
    shape, dtype, offsets = entry.get("shape"), entry.get("dtype"), entry.get("data_offsets")
    whole = lambda values: isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMS:
        corrupt(8, f"tensor {name!r} has the shape {shape!r:.60} and the offsets {offsets!r:.60}")
    if not isinstance(dtype, str):
        corrupt(8, f"tensor {name!r} has no type")
    nbytes = offsets[1] - offsets[0]
    if nbytes < 0:
        corrupt(8, f"tensor {name!r} ends before it begins")
    if dtype in _BYTES and math.prod(shape) * _BYTES[dtype] != nbytes:
        corrupt(8, f"tensor {name!r}: {nbytes} bytes for {dtype} of shape {shape}")
    return tuple(shape), nbytes, offsets[0]
