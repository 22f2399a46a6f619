"""Kernels as C functions `void(operands, thread, threads)`: compiled once per machine, found again by what they are.

Numba's own cache keys a function by its code and its file's date; a kernel made by a factory is more than that. Ours
is keyed by the kernel's name, its parameters, the instruction set and a hash of the kernels' sources, and lives in
the user's cache folder (`EDGE_RUNTIME_CACHE` moves it).
"""
from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import caching, ccallback

from edge_runtime.kernels.isa import current

SIGNATURE = types.void(types.intp, types.intp, types.intp)
Progress = Callable[[str], None]

_kernels: dict[str, tuple[int, Any]] = {}
_compiled: dict[str, float] = {}  # seconds, of the kernels that no cache had
_lock = threading.RLock()


def cache_folder() -> Path:
    """Where compiled kernels are kept: $EDGE_RUNTIME_CACHE, or the platform's cache folder."""
    chosen = os.environ.get("EDGE_RUNTIME_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "edge-runtime" / "kernels"


COMMON_SOURCES = ("isa.py", "vector_ir.py", "memory.py", "tiles.py", "compile.py")


@cache
def _stamp(module_file: str) -> str:
    """Changes with the sources a kernel is made of, with Numba, and with the instruction set."""
    digest = hashlib.blake2b(digest_size=8)
    here = Path(__file__).parent
    for source in (*(here / name for name in COMMON_SOURCES), Path(module_file)):
        digest.update(source.read_bytes())
    digest.update(f"{numba.__version__} {np.__version__} {current().name}".encode())
    return digest.hexdigest()


class _Locator(caching._CacheLocator):
    def __init__(self, name: str, stamp: str):
        self._name, self._stamp = name, stamp

    def get_cache_path(self) -> str:
        return str(cache_folder() / f"{current().name}-py{sys.version_info[0]}{sys.version_info[1]}")

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        return hashlib.blake2b(self._name.encode(), digest_size=6).hexdigest()

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> None:
        return None


class _CacheImpl(caching.CompileResultCacheImpl):
    def __init__(self, name: str, stamp: str):
        self._lineno = 0
        self._locator = _Locator(name, stamp)
        safe = "".join(c if c.isalnum() or c == "_" else "-" for c in name)[:80]
        self._filename_base = f"{safe}-{self._locator.get_disambiguator()}"


class _KernelCache(caching.FunctionCache):
    def __init__(self, py_func: Callable, name: str):
        self._name = name
        self._py_func = py_func
        stamp = _stamp(py_func.__code__.co_filename)
        self._impl = _CacheImpl(name, stamp)
        self._cache_path = self._impl.locator.get_cache_path()
        self._impl.locator.ensure_cache_path()
        self._cache_file = caching.IndexDataCacheFile(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=stamp)
        self.enable()

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (str(sig), codegen.magic_tuple(), self._name)

    @property
    def exists(self) -> bool:
        return (Path(self._cache_path) / f"{self._impl.filename_base}.nbi").exists()


def compile_kernel(name: str, make: Callable[[], Callable], progress: Progress | None = None) -> int:
    """Address of the C function `void(intp operands, intp thread, intp threads)` that `make()` describes.

    `name` says all that the kernel depends on (its parameters included). `progress` is called with the name before a
    kernel is compiled that no cache has.
    """
    with _lock:
        known = _kernels.get(name)
        if known is not None:
            return known[0]
        function = make()
        kernel: Any = ccallback.CFunc(function, (SIGNATURE.args, SIGNATURE.return_type), locals={},
                                 options={"error_model": "numpy", "boundscheck": False})
        found = False
        try:
            kernel._cache = _KernelCache(function, name)
            found = kernel._cache.exists
        except OSError:
            pass  # a read-only home: the kernel is compiled at every start
        if progress is not None and not found:
            progress(name)
        began = time.perf_counter()
        kernel.compile()
        if not kernel.cache_hits:
            _compiled[name] = time.perf_counter() - began
        _kernels[name] = (kernel.address, kernel)
        return kernel.address


def compiled_kernels() -> dict[str, float]:
    """Seconds that each kernel took which this process had to compile."""
    return dict(_compiled)
