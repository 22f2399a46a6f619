"""`edge-runtime serve`: an OpenAI-compatible server on this machine."""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.cli_common import (
    KV,
    Device,
    DeviceMemory,
    Offload,
    TbtMs,
    Threads,
    context_tokens,
    guarded,
    offload_options,
    say,
)
from edge_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.apps.model_host import LoadProgress, ModelHost

HELP = """Serve models to programs that speak OpenAI's API.

Only this machine can reach it unless --host says otherwise, and then an API key is needed. Ctrl-C or SIGTERM ends it:
what runs is finished first. Without --model, the model that ships with the package is served.

Examples:

\b
  edge-runtime serve
  edge-runtime serve -m qwen2.5-1.5b-instruct-q4_k_m.gguf --port 8000
  EDGE_RUNTIME_API_KEY=... edge-runtime serve --host 0.0.0.0
  curl http://127.0.0.1:8080/v1/models
"""

KEY_VARIABLE = "EDGE_RUNTIME_API_KEY"


@guarded
def serve(
    model: Annotated[list[Path] | None, typer.Option(
        "--model", "-m", help="GGUF file; repeatable: the first is opened, the others when a request names them.",
        show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="Port; 0: any free one.")] = 8080,
    api_key: Annotated[str | None, typer.Option(
        help=f"Key that requests must carry; better in the environment as {KEY_VARIABLE}.", show_default=False)] = None,
    origin: Annotated[list[str] | None, typer.Option(
        help="Origin of web pages that may call the server, or *; repeatable.", show_default="none")] = None,
    max_requests: Annotated[int, typer.Option(help="Requests that run and wait at once.")] = 1024,
    max_batch: Annotated[int, typer.Option(help="Sequences that are computed at once.")] = 32,
    grace: Annotated[float, typer.Option(help="Seconds that a shutdown waits for what runs.")] = 30.0,
    stream_interval: Annotated[float, typer.Option(
        help="Milliseconds between two events of a stream at least; 0: one for every token.")] = 40.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on stderr for every request.")] = False,
    device: Device = "auto",
    context: Annotated[str, typer.Option(help="Tokens of prompt and reply together: a number, or auto.")] = "auto",
    kv: KV = "auto",
    threads: Threads = None,
    offload: Offload = "auto",
    device_memory_gb: DeviceMemory = None,
    tbt_ms: TbtMs = None,
) -> None:
    from edge_runtime.apps.server.serving import check_installed
    from edge_runtime.apps.server.settings import ServerSettings

    check_installed()
    if port is not None and not 0 <= port <= 65535:
        raise InvalidRequestError("port", port, "from 0 (any free one) to 65535")
    settings = ServerSettings(
        host=host, port=port, api_key=api_key or os.environ.get(KEY_VARIABLE) or None,
        allowed_origins=tuple(origin or ()), max_requests=max_requests, grace_seconds=grace,
        stream_interval=stream_interval / 1000)

    from edge_runtime.apps.model_host import ModelHost
    from edge_runtime.apps.server.serving import serve as run

    models = ModelHost(model or (), device=device, context=context_tokens(context), kv=kv, threads=threads,
                       max_batch=max_batch, **offload_options(offload, device_memory_gb, tbt_ms))
    try:
        _load(models)
        run(models, settings, say=say, ready=lambda url: say(f"serving {models.current} at {url}/v1 (Ctrl-C ends it)"),
            log_level="info" if access_log else "warning", access_log=access_log)
    finally:
        models.close()
    say("stopped")


def _load(models: ModelHost) -> None:
    compiled, measured = 0, False

    def tell(progress: LoadProgress) -> None:
        nonlocal compiled, measured
        if progress.stage == "plan":
            say(str(progress.plan))
        elif progress.stage == "measure":
            if not measured:
                say("measuring what this machine takes for the model (first use only) ...")
            measured = True
        elif progress.stage == "compile":
            compiled += 1
            if compiled == 1:
                say("compiling kernels for this processor (first use only) ...")

    models.load(progress=tell)
