"""Edge Runtime: language models on one person's machine. Names are loaded on first use (PEP 562)."""
from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm", "Reply": "llm", "Chunk": "llm", "Session": "session",
    "SamplingParams": "sampling", "Grammar": "structured", "EarlyExit": "early_exit",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"edge_runtime.{_HOME[name]}"), name)
    raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
