"""JSON from outside: what SQLite can keep, and a page can be sent again."""
from __future__ import annotations

import json
import math
from typing import Any


def read_json(text: str | bytes) -> Any:
    """The value; lone surrogates become "?". Raises ValueError, for NaN and numbers beyond floats too, and
    RecursionError."""
    value = json.loads(text, parse_constant=_refused, parse_float=_finite)
    escaped = b"\\u" in text if isinstance(text, bytes) else "\\u" in text
    if escaped:
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)
