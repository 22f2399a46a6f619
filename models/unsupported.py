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


def unsupported(what: str, supported: Sequence[str] = (), mend: str = "") -> UnsupportedModelError:
    """The error for `what`, with what mends it here, if anything, and an offer to run the whole file through
    llama.cpp."""
    if _installed("llama_cpp"):
        offer = 'llama-cpp-python is installed: device="llama.cpp" runs the whole file through it.'
    else:
        offer = "pip install 'edge-runtime[llamacpp]' and device=\"llama.cpp\" run the whole file through llama.cpp."
    return UnsupportedModelError(what, supported, f"{mend} {offer}" if mend else offer)
