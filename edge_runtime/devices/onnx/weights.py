"""The initializers of a model's graphs: converted once, given to every session by reference."""
from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import numpy as np

from edge_runtime.devices.onnx.providers import runtime
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.models.graph.decoder import DecoderGraphs
from edge_runtime.models.graph.nodes import weights_name

ALIGNMENT = 4096


class GraphWeights:
    """Arrays by initializer name, in a mapped file without a name, and OrtValues that refer to them.

    Sessions of the CPU provider keep their own packed copies; then `release` gives the pages here back to the system,
    which reads them from the file again should anybody touch them. Sessions of a device copy them to its memory.
    """

    def __init__(self, graphs: DecoderGraphs):
        shapes = graphs.shapes()
        sizes = {name: -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
                 for name, (shape, dtype) in shapes.items()}
        self.nbytes = sum(sizes.values())
        self._map = _mapped_file(self.nbytes)
        self._arrays: dict[str, np.ndarray] = {}
        at = 0
        for name, (shape, dtype) in shapes.items():
            self._arrays[name] = np.frombuffer(self._map, dtype, int(np.prod(shape)), at).reshape(shape)
            at += sizes[name]
        for matrix in graphs.matrices:
            parts = {part: self._arrays[f"{weights_name(matrix)}.{part}"] for part in matrix.parts()}
            matrix.fill(graphs.file, parts)
            self.release()
        self._arrays |= graphs.vectors()
        self.values: dict[str, Any] = {name: runtime().OrtValue.ortvalue_from_numpy(array)
                                       for name, array in self._arrays.items()}

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.flush()
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.values.clear()
        self._arrays.clear()


def _mapped_file(nbytes: int) -> mmap.mmap:
    """A shared mapping of an unlinked temporary file; space is reserved first, since a full disk would else end the
    process on the first write."""
    nbytes = max(nbytes, ALIGNMENT)
    with tempfile.TemporaryFile(prefix="edge-runtime-") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
        except OSError as error:
            raise OutOfMemoryError(
                f"{nbytes / 2**20:.0f} MiB for converted weights do not fit the folder of temporary files, "
                f"{tempfile.gettempdir()}: {error}. Set TMPDIR to one that has room.") from error
        return mmap.mmap(file.fileno(), nbytes)

