"""The README's example runs, and what it names exists."""
from __future__ import annotations

import re
import subprocess
import sys

from typer.main import get_command

from edge_runtime.cli import app
from tests.test_architecture import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KV per 1k tokens" in done.stdout and len(done.stdout.splitlines()) > 10


def test_commands_and_options_it_shows_exist():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    shown = re.findall(r"^edge-runtime (\w+)(.*)$", README + (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"),
                       re.M)
    assert {name for name, _ in shown} == set(commands)
    for name, rest in shown:
        command = commands[name]
        if hasattr(command, "commands"):  # such as `models list`
            name = rest.split()[0]
            command = command.commands[name]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", re.sub(r'"[^"]*"', "", rest)):
            assert option in known, f"{name} {option}"


def test_links_lead_somewhere():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_two_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
