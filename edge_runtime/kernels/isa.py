"""The instruction set the kernels are written for, found on this machine or forced by `EDGE_RUNTIME_ISA`.

Kernels are vector IR of fixed shape (16 rows of a tile side by side); LLVM splits the vectors to what the processor
has. An instruction set only says how four byte products are summed and how much of a matrix is kept in registers.
"""
from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm

from edge_runtime.errors import DeviceError


@dataclass(frozen=True)
class Isa:
    """name; dot: how `acc += sum of 4 products u8 * s8` is emitted; columns: activation rows that the tile kernels
    keep in registers; requires: LLVM feature names; matrix_tiles: bf16 matrix tiles serve products with many rows."""

    name: str
    dot: str
    columns: int
    requires: tuple[str, ...] = ()
    matrix_tiles: bool = False
    machine: tuple[str, ...] = ("x86_64", "amd64", "aarch64", "arm64")


X86 = ("x86_64", "amd64")
ARM = ("aarch64", "arm64")
# Best first. Columns: a column of 16 rows takes an integer and a float accumulator of 16 lanes.
ALL = (
    Isa("amx", "vnni512", 8, ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16"),
        True, X86),
    Isa("avx512vnni", "vnni512", 8, ("avx512f", "avx512bw", "avx512vl", "avx512vnni"), False, X86),
    Isa("avxvnni", "vnni256", 2, ("avx2", "fma", "f16c", "avxvnni"), False, X86),
    Isa("avx2", "maddubs256", 2, ("avx2", "fma", "f16c"), False, X86),
    Isa("dotprod", "sdot128", 2, ("dotprod",), False, ARM),
    Isa("portable", "portable", 2),
)


def named(name: str) -> Isa:
    """The instruction set called `name`; DeviceError where it is unknown."""
    for isa in ALL:
        if isa.name == name:
            return isa
    raise DeviceError(f"EDGE_RUNTIME_ISA={name!r} is unknown; one of: {', '.join(i.name for i in ALL)}, auto.")


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """LLVM's names of what this processor can do."""
    return frozenset(name for name, present in dict(llvm.get_host_cpu_features()).items() if present)


@lru_cache(maxsize=1)
def _amx_granted() -> bool:
    """Asks Linux for the tile registers' state, once per process. Threads started afterwards inherit the grant."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0


def runs_here(isa: Isa) -> bool:
    if platform.machine().lower() not in isa.machine or not set(isa.requires) <= host_features():
        return False
    return not isa.matrix_tiles or _amx_granted()


@lru_cache(maxsize=1)
def current() -> Isa:
    """The best instruction set of this machine, or the one that EDGE_RUNTIME_ISA names; DeviceError if it is absent."""
    wanted = os.environ.get("EDGE_RUNTIME_ISA", "auto").strip().lower() or "auto"
    if wanted == "auto":
        return next(isa for isa in ALL if runs_here(isa))
    isa = named(wanted)
    if not runs_here(isa):
        missing = sorted(set(isa.requires) - host_features())
        raise DeviceError(f"EDGE_RUNTIME_ISA={wanted}: this processor lacks {', '.join(missing) or 'it'}; "
                          f"it runs {', '.join(i.name for i in ALL if runs_here(i))}.")
    return isa
