"""Every snippet of the documentation runs, and prints what its page shows.

A ```python or ```bash fence is a snippet; a ```text fence with a title right after it is its output: "Output" is
compared word for word, where `...` stands for anything; "Output, for example" is the model's prose, of which half the
words must come back (another processor rounds otherwise). Before a fence, `<!-- not run: reason -->` exempts it,
`<!-- needs: package -->` leaves it out where that is not installed (a whole page, at its top), and
`<!-- with: command -->` runs that server beside it, on a port of its own.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_runtime.models import bundled
from tests.hub_server import hub_server
from tests.test_architecture import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"(?P<before>(?:^<!-- (?:not run|needs|with): [^\n]+ -->\n+)*)^(?P<indent> *)```(?P<info>[^\n`]*)\n"
                   r"(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
PULLED = "bartowski/Llama-3.2-1B-Instruct-GGUF"  # what pages pull; a local hub gives them the bundled model


def steps_of(page: Path) -> list[dict[str, str]]:
    """Snippets in order: language, code, expected output and its kind, place."""
    text = page.read_text(encoding="utf-8")
    found: list[dict[str, str]] = []
    end = 0
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        notes = dict(re.findall(r"<!-- (not run|needs|with): (.+) -->", match["before"]))
        if "needs" in notes and find_spec(notes["needs"]) is None:
            continue
        if language in ("python", "bash") and "not run" not in notes:
            line = text.count("\n", 0, match.start("code")) + 1
            found.append({"language": language, "code": "\n" * (line - 1) * (language == "python") + code,
                          "place": f"{page.relative_to(ROOT)}:{line}", "expected": "", "title": "",
                          "server": notes.get("with", "")})
            end = match.end()
        elif language == "text" and "Output" in rest and found and not text[end:match.start()].strip():
            found[-1] |= {"expected": code, "title": rest}
    return found


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def agrees(output: str, step: dict[str, str]) -> bool:
    if "for example" in step["title"]:
        shown = words(step["expected"])
        return sum(word in set(words(output)) for word in shown) * 2 >= len(shown)
    pattern = r"[\s\S]*?".join(map(re.escape, step["expected"].strip().split("...")))
    lines = "\n".join(line.rstrip() for line in output.strip().splitlines())
    return re.fullmatch(pattern, lines) is not None


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if steps_of(page)],  # the README has a test of its own
                         ids=lambda page: page.relative_to(DOCS).as_posix())
def test_snippets_run_and_print_what_is_shown(page, tmp_path):
    for package in re.findall(r"<!-- needs: (\S+) -->", page.read_text(encoding="utf-8").partition("\n#")[0]):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    steps, work = steps_of(page), tmp_path / "work"
    shutil.copytree(ROOT / "examples", work / "examples")
    (tmp_path / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    with hub_server() as hub:
        hub.add(PULLED, {f"Llama-3.2-1B-Instruct-{quant}.gguf": bundled.path().read_bytes()
                         for quant in ("Q4_0", "Q8_0")})
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"),
                       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
            environment.pop(name, None)
        done = subprocess.run([sys.executable, str(ROOT / "tests" / "docs_runner.py"), str(tmp_path / "steps.json"),
                               str(tmp_path / "results.json")], cwd=work, env=environment, capture_output=True,
                              text=True, timeout=600)
    assert (tmp_path / "results.json").exists(), done.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for step, result in zip(steps, results):
        assert not result["error"], f"{step['place']}\n{result['error']}\n{done.stderr}"
        if step["expected"]:
            assert agrees(result["output"], step), (f"{step['place']} printed\n{result['output']}\nthe page shows\n"
                                                    f"{step['expected']}")
    assert len(results) == len(steps)


def test_no_snippet_is_passed_over():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *```py(?:3|thon3)?\b", text, re.M)) == 0, f"{page.name}: say python"
        fences = len(re.findall(r"^ *```(?:python|bash)$", text, re.M))
        exempt = len(re.findall(r"^<!-- not run: ", text, re.M))
        missing = sum(find_spec(name) is None for name in re.findall(r"<!-- needs: (\S+) -->", text))
        assert fences - exempt - missing <= len(steps_of(page)) <= fences, page.name


def test_there_are_the_pages_that_were_promised():
    names = {page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents}
    assert {"tutorial.md", *(f"recipes/{name}.md" for name in (
        "stream", "json_schema", "sessions", "async_web", "batch", "early_exit", "placement"))} <= names
    for page in PAGES:
        if page.parent.name == "recipes" or page.name == "tutorial.md":
            assert steps_of(page), page


def test_commands_on_every_page_have_the_options_they_show():
    from typer.main import get_command

    from edge_runtime.cli import app

    shown = 0
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            for rest in re.findall(r"(?:^|[;|(] *|&& *|[A-Z_]+=\S+ +)edge-runtime (.+)", match["code"], re.M):
                arguments = re.sub(r"""("[^"]*"|'[^']*')""", "TEXT", rest.partition(" #")[0]).split()
                command = get_command(app)
                while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
                    assert arguments[0] in command.commands, f"{page.name}: {rest}"
                    command = command.commands[arguments.pop(0)]
                known = {option for parameter in command.params
                         for option in (*parameter.opts, *parameter.secondary_opts)} | {"-h", "--help"}
                for option in arguments:
                    if option in ("|", ">", "<", "&", "&&", ";"):
                        break
                    if re.match(r"--?[a-z]", option):
                        assert option.partition("=")[0] in known, f"{page.name}: {rest}"
                        shown += 1
    assert shown > 50


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_reference_names_what_exists():
    from importlib import import_module

    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M):
            module, _, name = path.rpartition(".")
            try:
                import_module(path)
            except ImportError:
                assert hasattr(import_module(module), name), f"{page.name}: {path}"


@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir",
                           str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    assert "SamplingParams" in (site / "reference" / "sampling" / "index.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://(?!squidfunk)", text.replace(
            'rel="canonical"', "")), f"{page}: loads something from the network"
