"""The one sentence that follows every `UnsupportedModelError`: whether llama.cpp can run the file instead."""
from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from edge_runtime.errors import UnsupportedModelError


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported already, without a spec
        return True


def unsupported(what: str, supported: Sequence[str] = ()) -> UnsupportedModelError:
    """The error for `what`, with an offer to run the whole file through llama.cpp."""
    if _installed("llama_cpp"):
        mend = 'llama-cpp-python is installed: device="llama.cpp" runs the whole file through it.'
    else:
        mend = "pip install 'edge-runtime[llamacpp]' and device=\"llama.cpp\" run the whole file through llama.cpp."
    return UnsupportedModelError(what, supported, mend)
