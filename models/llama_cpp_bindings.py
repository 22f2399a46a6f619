"""llama-cpp-python's C bindings, opened at one place: the process has one log callback, which must outlive every call.

llama.cpp keeps only the address of the callback that was set last. One that Python has freed since ends the process at
the next line that llama.cpp logs, perhaps in another file's model; therefore nobody else sets one.
"""
from __future__ import annotations

import ctypes
import threading
from typing import Any

from edge_runtime.errors import MissingExtraError

_ERROR_LEVEL = 4
_KEPT_LINES = 20

_opening = threading.Lock()
_errors: list[str] = []
_callback: Any = None


def bindings(wanted_for: str = 'device="llama.cpp"') -> Any:
    """The llama_cpp module, its errors kept for our messages. Raises `MissingExtraError`, naming what wants it."""
    global _callback
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtraError("llama-cpp-python", "llamacpp", wanted_for) from error
    with _opening:
        if _callback is None:
            def note(level: int, text: bytes, _: object) -> None:
                if level == _ERROR_LEVEL:
                    _errors.append(text.decode("utf-8", "replace").strip())
                    del _errors[:-_KEPT_LINES]

            _callback = llama_cpp.llama_log_callback(note)
            llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
    return llama_cpp


def forget_errors() -> None:
    _errors.clear()


def last_error() -> str:
    """The last line that llama.cpp logged as an error since `forget_errors`."""
    return _errors[-1] if _errors else "it gave no reason"
