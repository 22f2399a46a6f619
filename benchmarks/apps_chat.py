"""The desktop chat, measured in a real browser: how soon its page is ready, and how soon a token is in it.

    python benchmarks/apps_chat.py [--quick]

Needs Chromium (CHROMIUM names another than the system's) and pip install 'edge-runtime[browser]'.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
REPORT = """Summarize the following text.

At 08:40 on 3 June users lost access to the payroll portal. For 95 minutes, 1,240 people could not work. The problem was
traced to an expired certificate. No data was lost. Ravi Okafor fixed it with a restart of the login service."""
# Notes, in milliseconds since 1970, when a reply's first text is in the page, and when its frame is painted.
WATCH = """(() => {
  window.firsts = {};
  new MutationObserver(() => {
    for (const reply of document.querySelectorAll("article.assistant")) {
      if (window.firsts[reply.id] || !reply.querySelector(".prose")?.textContent.trim()) continue;
      const now = () => performance.timeOrigin + performance.now();
      const first = window.firsts[reply.id] = {there: now(), painted: 0};
      requestAnimationFrame(() => setTimeout(() => { first.painted = now(); }));
    }
  }).observe(document.querySelector("#messages"), {childList: true, subtree: true, characterData: true});
})()"""


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise RuntimeError("no chromium here: apt-get install chromium, or set CHROMIUM to the path of one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def until(page: Any, expression: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := page.evaluate(expression)):
        if time.monotonic() > deadline:
            raise TimeoutError(expression)
        time.sleep(0.002)
    return found


def page_ready(browser: Any, folder: Path) -> tuple[float, float]:
    """Seconds from the start of `edge-runtime chat` to its page, and to the open model. The browser runs already."""
    began = time.time()
    process = subprocess.Popen([sys.executable, "-m", "edge_runtime.cli", "chat", "--no-open", "--data", str(folder)],
                               stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        link = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+/open/\S+", line)))
        page = browser.new_page()
        page.goto(link)
        at = until(page, "document.documentElement.dataset.ready")
        ready = page.evaluate("performance.timeOrigin") / 1000 + float(at) / 1000 - began
        until(page, "document.querySelector('#model-name').textContent === 'edge-tiny'")
        model = time.time() - began
        page.close()
        return ready, model
    finally:
        process.terminate()
        process.wait(30)


def first_tokens(browser: Any, folder: Path, count: int) -> list[dict[str, float]]:
    """Per reply, milliseconds from the engine's first token to the page's text (there) and its frame (painted)."""
    from edge_runtime.apps.chat.launcher import Server
    from edge_runtime.apps.chat.store import Store
    from edge_runtime.apps.model_host import ModelHost
    from edge_runtime.request import Request

    drawn: list[float] = []
    draw = Request.draw

    def noted(self: Request, *arguments: Any) -> Any:
        first = not self.token_ids
        reason = draw(self, *arguments)
        if first:
            drawn.append(1000 * time.time())
        return reason

    Request.draw = noted  # type: ignore[method-assign]
    server = Server(Store(folder), ModelHost())
    try:
        page = browser.new_page()
        page.goto(server.start())
        until(page, "document.querySelector('#model-name').textContent === 'edge-tiny'")
        page.evaluate(WATCH)
        found = []
        for number in range(count + 1):
            if number % 5 == 0:  # a new conversation now and then: its reply comes into a page that shows nothing yet
                page.click("#new-chat")
            drawn.clear()
            page.fill("#composer-text", REPORT if number % 5 == 0 else "Question: Who fixed it?")
            page.keyboard.press("Enter")
            until(page, "document.querySelector('#stop').hidden && document.querySelectorAll("
                        f"'article.assistant[aria-busy=false]').length === {number % 5 + 1}")
            name = page.locator("article.assistant").last.get_attribute("id")
            seen = until(page, f"window.firsts['{name}']?.painted && window.firsts['{name}']")
            if number:  # the first one compiles and warms
                found.append({key: value - drawn[0] for key, value in seen.items()})
        page.close()
        return found
    finally:
        Request.draw = draw  # type: ignore[method-assign]
        server.stop()


def rows(quick: bool) -> list[dict[str, Any]]:
    """What is promised of the chat: name, value, must, goal, better ("lower"), detail."""
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        folder = Path(scratch)
        page_ready(browser, folder / "ready")  # file caches and compiled kernels
        starts = [page_ready(browser, folder / "ready") for _ in range(3 if quick else 9)]
        replies = first_tokens(browser, folder / "tokens", 9 if quick else 39)
    ready = [one[0] for one in starts]
    painted = sorted(one["painted"] for one in replies)
    there = statistics.median(one["there"] for one in replies)
    return [
        {"name": "chat page ready, warm, s", "value": statistics.median(ready), "must": 3.0, "goal": 1.5,
         "better": "lower", "detail": f"median of {len(ready)}, worst {max(ready):.2f}; the model is open after "
                                      f"{statistics.median(one[1] for one in starts):.2f}"},
        {"name": "first token in the page after the engine has it, ms", "value": statistics.median(painted),
         "must": 50.0, "goal": 20.0, "better": "lower",
         "detail": f"median of {len(painted)}, painted; in the page's tree after {there:.1f}, nine in ten painted "
                   f"within {painted[int(0.9 * (len(painted) - 1))]:.1f}"},
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    for row in rows(parser.parse_args().quick):
        print(f"{row['name']}: {row['value']:.2f} (must {row['must']:g}, goal {row['goal']:g}) {row['detail']}")
