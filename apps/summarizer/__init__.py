"""The batch summarizer: documents or requests in, summaries or answers out, and nothing lost when it is killed."""
from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Summarizer": "summarizer", "Summary": "summarizer", "Target": "summarizer", "Totals": "report",
    "closing_report": "report", "Files": "sources", "BatchLines": "sources", "source_of": "sources",
    "LocalBackend": "backend", "ServerBackend": "servers", "JobError": "errors", "LedgerBusyError": "errors",
    "ManifestError": "errors", "StorageError": "errors", "ServersUnreachableError": "errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
