"""Chromium, pages, screenshots, and the chats that are opened: the bundled model in a process of its own, or a model
that says what it is told to in a thread of this one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apps.chats import Client, Pace, chatting
from tests.browser.steps import until

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'edge-runtime[browser]'")

ROOT = Path(__file__).parent.parent.parent
SCREENSHOTS = ROOT / "out" / "screenshots"
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MS = 60_000


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if "browser" in Path(item.fspath).parts:
            item.add_marker(pytest.mark.browser)


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.exit("no chromium here: apt-get install chromium, or set CHROMIUM to the path of one", returncode=1)
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield opened
        opened.close()


class Running:
    """`edge-runtime chat` in a process of its own. link: opens its page once. delay: seconds per token of a model that
    says what stands behind SAY:, instead of the bundled one."""

    def __init__(self, folder: Path, *, delay: float | None = None):
        self.folder = folder
        chat = ["edge_runtime.cli", "chat", "--no-open", "--data", str(folder)]
        scripted = ["tests.browser.scripted_chat", str(folder), str(delay)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *(chat if delay is None else scripted)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.said: list[str] = []
        self.link = self._link()

    def _link(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            found = re.search(r"http://\S+/open/\S+", line)
            if found:
                return found[0]
        raise AssertionError(f"no link: {''.join(self.said)}")

    def server_link(self) -> str:
        """Another link, as a second `edge-runtime chat` would get it."""
        from edge_runtime.apps.chat.launcher import link_of_owner
        from edge_runtime.apps.chat.lock import read_owner

        found = link_of_owner(read_owner(self.folder))
        assert found
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start `edge-runtime chat` on the test's folder."""
    all_of_them: list[Running] = []

    def begin(*, delay: float | None = None) -> Running:
        all_of_them.append(Running(tmp_path / "data", delay=delay))
        return all_of_them[-1]

    yield begin
    for one in all_of_them:
        one.stop()


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: Any) -> Iterator[Running]:
    """One chat over the bundled model for a whole file of tests."""
    running = Running(tmp_path_factory.mktemp("bundled"))
    yield running
    running.stop()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Start a chat over a model that says what stands behind SAY:."""
    with contextlib.ExitStack() as stack:
        yield lambda **device: stack.enter_context(chatting(tmp_path / "scripted", **device))


@pytest.fixture
def paced(scripted: Callable[..., Client]) -> Iterator[Callable[..., tuple[Client, Pace]]]:
    """The same over a model that goes as fast as its `Pace` lets it."""
    made: list[Pace] = []

    def begin(steps: float = float("inf"), seconds: float = 0.0) -> tuple[Client, Pace]:
        made.append(Pace(steps, seconds))
        return scripted(fail=made[-1]), made[-1]

    yield begin
    for pace in made:
        pace.go_on()


class Pages:
    """Makes pages whose troubles fail the test."""

    def __init__(self, browser: Any):
        self._browser = browser
        self._contexts: list[Any] = []
        self.troubles: list[str] = []
        self.tolerant = False  # set by tests that refuse requests or take the server away, which browsers log

    def __call__(self, link: str, *, width: int = 1200, height: int = 800, **options: Any) -> Any:
        context = self._browser.new_context(viewport={"width": width, "height": height}, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        self._contexts.append(context)
        return self.open(context, link)

    def open(self, context: Any, link: str) -> Any:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on(
            "console", lambda said: self.troubles.append(f"{said.type}: {said.text}") if said.type == "error" else None
        )
        page.goto(link)
        until(page, "document.documentElement.dataset.ready")
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def pages(browser: Any) -> Iterator[Pages]:
    """`pages(link)` opens a page in a browser profile of its own; errors in its console fail the test, unless the test
    is `tolerant`."""
    made = Pages(browser)
    yield made
    made.close()
    assert made.tolerant or not made.troubles, made.troubles


@pytest.fixture(scope="session")
def shot() -> Callable[[Any, str], None]:
    """Keep a picture of a page under out/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=str(SCREENSHOTS / f"{name}.png"))
