"""`edge-runtime chat`: the desktop chat, in a window of its own or in the browser."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.cli_common import (
    KV,
    Context,
    Device,
    DeviceMemory,
    Model,
    Offload,
    TbtMs,
    Threads,
    context_tokens,
    guarded,
    offload_options,
    say,
)

HELP = """Chat with a model, in a window of its own or in the browser.

Everything stays on this machine: the page comes from a server that only this machine reaches, conversations are kept in
a database of yours. A window needs the extra desktop (pip install 'edge-runtime[desktop]'); without it the page
opens in the browser.

Examples:

\b
  edge-runtime chat
  edge-runtime chat -m qwen2.5-1.5b-instruct-q4_k_m.gguf
  edge-runtime chat --browser --data ~/chats
  edge-runtime chat --no-open --port 8765
"""


@guarded
def chat(
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="Folder of conversations and drafts; without: the user's own.",
                                              show_default=False)] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: that of last time, or a free one.")] = 0,
    window: Annotated[bool | None, typer.Option("--window/--browser", help="Where the page opens.",
                                                show_default="a window where pywebview is installed")] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page, or only print its link.")] = True,
    device: Device = "auto",
    context: Context = "auto",
    kv: KV = "auto",
    threads: Threads = None,
    offload: Offload = "auto",
    device_memory_gb: DeviceMemory = None,
    tbt_ms: TbtMs = None,
) -> None:
    from edge_runtime.apps.chat import launcher

    launcher.run(launcher.Options(
        data=data, port=port, window=window, open_page=open_page, model=model,
        host_options={"device": device, "context": context_tokens(context), "kv": kv, "threads": threads,
                      **offload_options(offload, device_memory_gb, tbt_ms)}), say)
