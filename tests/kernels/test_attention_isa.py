"""The attention tests again under the instruction sets that processors without AVX512 get."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.kernels import compile as kernel_cache
from edge_runtime.kernels.isa import current, named, runs_here

CHOSEN = ("(test_decode and 64-4 or test_decode and 80-3 or test_prefill and 64-4 or cut and 4- or neighbours "
          "or standalone or nan or neox)")


@pytest.mark.parametrize("isa", ["avx512vnni", "avx2", "portable"])
def test_attention_under(isa):
    if isa == current().name or not runs_here(named(isa)):
        pytest.skip(f"{isa} is what runs anyway, or does not run here")
    here = Path(__file__).parent
    environment = {**os.environ, "EDGE_RUNTIME_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment.setdefault("EDGE_RUNTIME_CACHE", str(kernel_cache.cache_folder().parent))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN,
         str(here / "test_attention.py"), str(here / "test_rope.py")],
        cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
