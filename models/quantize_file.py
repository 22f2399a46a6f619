"""A float GGUF file in, a quantized one out."""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import InvalidRequestError, UnsupportedModelError
from edge_runtime.models.gguf_file import GGUFFile, TensorInfo
from edge_runtime.models.gguf_writer import RawValue, TensorSource, write_gguf
from edge_runtime.models.names import EMBEDDING, HEAD
from edge_runtime.quant.dequantize import dequantize
from edge_runtime.quant.formats import BlockFormat, block_format
from edge_runtime.quant.mixtures import FileType, file_type, fitting_format, mixed_format
from edge_runtime.quant.quantize import quantize

CHUNK_WEIGHTS = 1 << 22  # 16 MB of float32 per thread
QUANTIZATION_VERSION = 2  # ggml's, since Q4_0 and its like took their layout of today

Progress = Callable[[int, int], None]


def quantize_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    *,
    pure: bool = False,
    overrides: Mapping[str, str] | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    method: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Rewrites an F32, F16 or BF16 file with the matrices in `type`, and returns the path written.

    type: a name of quant.mixtures.FILE_TYPES, "Q4_K" meaning Q4_K_M. Vectors stay as they are, and all metadata is
    carried over but for `general.file_type` and `general.quantization_version`. pure: every matrix gets the base type,
    no mixture. overrides: types by tensor name, before all else. importance: float32 [inputs] by tensor name, weights
    of the squared error; method: see quant.quantize. progress: called with the weights done and their total.
    The target appears when it is complete. UnsupportedModelError: the source is quantized already, or one of several
    files of a model.
    """
    target = Path(target)
    chosen = file_type(type)
    if target.exists() and target.samefile(source):
        raise InvalidRequestError("target", str(target), "another file than the source")
    with GGUFFile(source) as file:
        parts = file.metadata.get("split.count", 0)
        if not isinstance(parts, int) or parts > 1:
            raise UnsupportedModelError("one of several files of a model", ("a model in one file",))
        formats = _formats(file, chosen, pure, overrides or {})
        total = sum(info.size for info in file.tensors.values())
        done = 0

        threads = threads or os.cpu_count() or 1

        def report(weights: int) -> None:
            nonlocal done
            done += weights
            if progress:
                progress(done, total)

        with ThreadPoolExecutor(threads) as pool:
            tensors = [
                _tensor(file, info, formats[name], (importance or {}).get(name), method, pool, threads, report)
                for name, info in file.tensors.items()
            ]
            return write_gguf(target, _metadata(file, chosen), tensors)


def _metadata(file: GGUFFile, chosen: FileType) -> dict[str, Any]:
    pairs: dict[str, Any] = {key: RawValue(file.metadata.raw(key)) for key in file.metadata}
    pairs["general.file_type"] = chosen.number
    pairs["general.quantization_version"] = QUANTIZATION_VERSION
    return pairs


def _formats(file: GGUFFile, chosen: FileType, pure: bool, overrides: Mapping[str, str]) -> dict[str, BlockFormat]:
    layers = [_layer(name) for name in file.tensors]
    count = max(layers, default=-1) + 1
    head = HEAD if HEAD in file.tensors else EMBEDDING
    unknown = [name for name in overrides if name not in file.tensors]
    if unknown:
        raise InvalidRequestError("overrides", unknown[0], "a tensor of the file")
    formats = {}
    for (name, info), layer in zip(file.tensors.items(), layers):
        if not info.format.is_float:
            raise UnsupportedModelError(f"quantizing {name!r} from {info.type}", ("F32", "F16", "BF16"),
                                        "Start from the float file.")
        if name in overrides:
            formats[name] = block_format(overrides[name])
            if info.shape[-1] % formats[name].block_size:
                raise InvalidRequestError("overrides", overrides[name], f"a type whose block divides {info.shape[-1]}")
        elif len(info.shape) < 2 or not name.endswith(".weight") or "norm" in name:
            formats[name] = info.format
        elif pure:
            formats[name] = fitting_format(chosen.base, info.shape[-1])
        else:
            formats[name] = mixed_format(chosen, name, layer, count, info.shape[-1], name == head)
    return formats


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d{1,6})\.", name)
    return int(found[1]) if found else -1


def _tensor(file: GGUFFile, info: TensorInfo, format: BlockFormat, importance: np.ndarray | None, method: str,
            pool: ThreadPoolExecutor, threads: int, report: Callable[[int], None]) -> TensorSource:  # fmt: skip
    inputs = info.shape[-1]
    rows = info.size // inputs
    step = max(1, CHUNK_WEIGHTS // inputs)
    row_bytes = info.format.row_bytes(inputs)

    def convert(first: int) -> np.ndarray:
        count = min(step, rows - first)
        raw = file.data(info.name)[first * row_bytes : (first + count) * row_bytes]
        if format == info.format:
            return raw.reshape(count, -1)
        return quantize(dequantize(raw, info.format, (count, inputs)), format, importance, method)

    def chunks() -> Iterator[np.ndarray]:
        starts = range(0, rows, step)
        for window in range(0, len(starts), threads):  # no more in memory than the threads work on
            for chunk in pool.map(convert, starts[window : window + threads]):
                yield chunk
                report(chunk.size // format.row_bytes(inputs) * inputs)
        file.release(info.name)

    return TensorSource(info.name, info.shape, format, chunks)
