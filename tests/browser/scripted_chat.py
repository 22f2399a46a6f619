"""`edge-runtime chat` over a model that says what it is told to, in a process that can be killed.

python -m tests.browser.scripted_chat FOLDER SECONDS_PER_TOKEN
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_runtime.apps.chat import launcher
from edge_runtime.apps.model_host import ModelHost
from tests.apps.servers import echo_llm


def main(folder: str, delay: str) -> None:
    launcher._host = lambda options: ModelHost.of(echo_llm(delay=float(delay)), "echo")
    launcher.run(launcher.Options(data=Path(folder), open_page=False), lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    main(*sys.argv[1:])
