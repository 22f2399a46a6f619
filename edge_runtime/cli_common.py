"""What the commands share: errors as one line and an exit code, loading with progress, prompts from standard input."""
from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from edge_runtime.errors import CancelledError, EdgeRuntimeError, InvalidRequestError
from edge_runtime.progress import PROFILING

if TYPE_CHECKING:
    from edge_runtime.llm import LLM

FAILED, USAGE, CANCELLED, BROKEN_PIPE = 1, 2, 130, 141  # the last two: 128 + the signal, as shells count

Model = Annotated[Path | None, typer.Option(
    "--model", "-m", help="GGUF file; without one, the model that ships with the package.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, llama.cpp (extra llamacpp), or onnx:cpu, webgpu, cuda, openvino, "
                                     "qnn, coreml, directml, vitisai (extras of these names).")]
Context = Annotated[str, typer.Option(help="Tokens of prompt and reply together: a number, or auto.")]
KV = Annotated[str, typer.Option(help="How the KV cache is kept: auto, int8 or fp16.")]
Offload = Annotated[str, typer.Option(help="Who holds an accelerator's KV: on (this machine's memory; the processor "
                                      "attends over what the device has no room for), off (the device), or auto.")]
DeviceMemory = Annotated[float | None, typer.Option("--device-memory-gb", help="Of the device's memory, GB to use.",
                                                    show_default="what it has free")]
TbtMs = Annotated[float | None, typer.Option(
    "--tbt-ms", help="Milliseconds between two tokens that work in bulk must leave to those who wait; offloads.",
    show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="Threads; without: all physical cores.",
                                             show_default=False)]


def say(text: str = "") -> None:
    """A line on stderr, which never mixes with results."""
    print(text, file=sys.stderr, flush=True)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors are one clear line on stderr and an exit code: 2 for what the caller asked wrongly, 1 for
    what failed, 130 for Ctrl-C; a reader that goes away ends it quietly."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        if sys.stdout is None:  # closed by who started us: `>&-`
            say("error: standard output is closed. Send it to a file, or to /dev/null")
            raise typer.Exit(FAILED)
        _print_whatever_comes(sys.stdout)
        try:
            result = command(*args, **options)
            sys.stdout.flush()
            return result
        except (KeyboardInterrupt, CancelledError):
            say("cancelled")
            code = CANCELLED
        except EdgeRuntimeError as error:
            say(f"error: {error}")
            code = USAGE if isinstance(error, InvalidRequestError) else FAILED
        except BrokenPipeError:
            # Python flushes stdout once more as it exits: into nothing, then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = BROKEN_PIPE
        except OSError as error:
            say(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
            code = FAILED
        except MemoryError as error:
            say(f"error: out of memory: {error or 'the system refused an allocation'}")
            code = FAILED
        raise typer.Exit(code)

    return run


def _print_whatever_comes(out: TextIO) -> None:
    """A terminal of another encoding than UTF-8 gets escapes for what it cannot show, rather than half a reply."""
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")


def offload_options(offload: str, device_memory_gb: float | None, tbt_ms: float | None) -> dict[str, Any]:
    """As `LLM` takes them."""
    if device_memory_gb is not None and not 0 < device_memory_gb < 1e9:
        raise InvalidRequestError("device_memory_gb", device_memory_gb, "above 0")
    return {"offload": offload, "tbt_ms": tbt_ms,
            "device_memory": None if device_memory_gb is None else max(1, int(device_memory_gb * 1e9))}


def context_tokens(text: str) -> int | str:
    """The value of --context."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InvalidRequestError("context", text, "a whole number of tokens, or auto") from None


@contextlib.contextmanager
def compiling() -> Iterator[Callable[[str], None]]:
    """A function to tell the kernels to that are compiled now, and what is measured; it shows them meanwhile."""
    from rich.console import Console

    console = Console(stderr=True)
    count, began, measured = 0, 0.0, 0.0
    with contextlib.ExitStack() as stack:
        status: Any = None

        def show_measuring(what: str) -> None:
            nonlocal measured, status
            if not measured:
                measured = time.perf_counter()
                say("measuring what this machine takes for the model (first use only) ...")
                if console.is_terminal and status is None:
                    status = stack.enter_context(console.status("measuring"))
            if status is not None:
                status.update(f"measuring, {time.perf_counter() - measured:.0f} s: {what}")

        def show(name: str) -> None:
            nonlocal count, began, status
            if name.startswith(PROFILING):
                show_measuring(name.removeprefix(PROFILING))
                return
            if not count:
                began = time.perf_counter()
                if console.is_terminal:
                    status = stack.enter_context(console.status("compiling kernels"))
                else:
                    say("compiling kernels for this processor (first use only) ...")
            count += 1
            if status is not None:
                status.update(f"compiling kernels for this processor (first use only): {count}, "
                              f"{time.perf_counter() - began:.0f} s, {name}")

        yield show
    if measured:
        say("measured; the next start finds the profile")
    if count:
        from edge_runtime.kernels.compile import cache_folder

        kept = "the next start finds them" if os.access(cache_folder(), os.W_OK) else (
            f"they cannot be kept in {cache_folder()}: set EDGE_RUNTIME_CACHE to a folder that may be written")
        say(f"compiled {count} kernels in {time.perf_counter() - began:.0f} s; {kept}")


def open_model(model: Path | None, **options: Any) -> LLM:
    """`LLM(model, **options)`, with first-use compilation shown."""
    from edge_runtime.llm import LLM

    with compiling() as progress:
        return LLM(model, progress=progress, **options)


def prompt_from(text: str | None) -> str:
    """The prompt itself, or standard input where it is `-` or absent. Raises InvalidRequestError for input that is
    not UTF-8 or not there."""
    if text is not None and text != "-":
        return text
    if sys.stdin is None or sys.stdin.closed:
        raise InvalidRequestError("PROMPT", text, "given, or come on standard input")
    if text is None and sys.stdin.isatty():
        say("reading the prompt from the terminal; end it with Ctrl-D (Ctrl-Z and Enter on Windows)")
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError("standard input", raw[max(0, error.start - 8):error.start + 8],
                                  f"UTF-8; byte {error.start} is not") from error
