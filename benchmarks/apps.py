"""What people run, measured: server, desktop chat, batch summarizer; every figure as must, goal and what was found.

    python benchmarks/apps.py --models ~/models-bench --json figures.json     (an hour on two cores)
    python benchmarks/apps.py --quick                                         (under five minutes)

Each part is a module beside this one with `rows(quick)`. What it needs:
pip install 'edge-runtime[server,documents,bench]', for the chat's page Chromium and
Playwright; a part that cannot run is reported and does not stop the others.
"""
from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PARTS = {"server": "apps_server", "chat": "apps_chat", "summarizer": "apps_summarizer"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verdict(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    sign = 1 if row["better"] == "higher" else -1
    if sign * row["value"] >= sign * row["goal"]:
        return "goal"
    return "must" if sign * row["value"] >= sign * row["must"] else "MISSED"


def measure(part: str, quick: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    """A part's rows; one that says why, where it cannot run. options: given to those parts that take them."""
    began = time.perf_counter()
    try:
        function = importlib.import_module(PARTS[part]).rows
        known = inspect.signature(function).parameters
        found: list[dict[str, Any]] = function(quick, **{name: value for name, value in options.items()
                                                         if name in known})
    except Exception as error:
        traceback.print_exc()
        found = [{"name": part, "value": None, "must": 0.0, "goal": 0.0, "better": "higher",
                  "detail": f"{type(error).__name__}: {error}"}]
    for row in found:
        row["must"] = 0.0 if row.get("must") is None else row["must"]
        if row.get("goal") is None:  # promised as a must alone
            row["goal"] = row["must"]
        say(f"{row['name']}: {row['value']} ({verdict(row)}) {row['detail']}")
    say(f"-- {part}: {time.perf_counter() - began:.0f} s")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | measured | must | goal | | detail |", "|---|---|---|---|---|---|"]
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.3g}" if row["value"] < 100 else f"{row['value']:.0f}"
        lines.append(f"| {row['name']} | {value} | {row['must']:g} | {row['goal']:g} | {verdict(row)} | "
                     f"{row['detail']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder that keeps the model files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, nargs="?", const=Path("-"), help="write the rows as JSON, - or nothing: "
                                                                             "to standard output")
    a = parser.parse_args()
    parts = a.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: one of {', '.join(PARTS)}")
    found = [row for part in parts for row in measure(part, a.quick, {"models": a.models, "threads": a.threads})]
    if a.json and str(a.json) != "-":
        a.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if a.json and str(a.json) == "-" else table(found))


if __name__ == "__main__":
    main()
