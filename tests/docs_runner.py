"""Runs the snippets of one page in order, in this process: `python tests/docs_runner.py STEPS.json RESULTS.json`.

Python snippets of a page share one namespace, shell snippets one folder. Stops at the first that fails.
"""
from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator


def run(steps: list[dict[str, str]]) -> list[dict[str, str]]:
    """For each step its output, and what went wrong where something did."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    results = []
    for step in steps:
        output, error = io.StringIO(), ""
        if step["language"] == "python":
            with beside(step) as code, contextlib.redirect_stdout(output):
                try:
                    exec(compile(code, step["place"], "exec"), namespace)
                except BaseException:
                    error = traceback.format_exc()
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", step["code"]], stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True)
            output.write(done.stdout)
            if done.returncode:
                error = f"exit code {done.returncode}\n{done.stderr}"
        results.append({"output": output.getvalue(), "error": error})
        if error:
            break
    return results


@contextlib.contextmanager
def beside(step: dict[str, str]) -> Iterator[str]:
    """The code of a step, and the server that it talks to, if any; the code gets the address where that listens."""
    if not step["server"]:
        yield step["code"]
        return
    with subprocess.Popen([*step["server"].split(), "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = ""
            while (found := re.search(r"http://[\w.]+:\d+", said)) is None:
                line = server.stderr.readline()
                if not line:
                    raise RuntimeError(f"{step['server']} ended: {said}")
                said += line
            yield re.sub(r"http://127\.0\.0\.1:\d+", found[0], step["code"])
        finally:
            server.terminate()
            server.communicate(timeout=60)


if __name__ == "__main__":
    sys.path[0] = ""  # as in a script of the reader's own, not in this folder
    with open(sys.argv[1], encoding="utf-8") as file:
        wanted = json.load(file)
    found = run(wanted)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(found, file)
