"""The page itself: light, dark, 360 px, the keyboard, what a screen reader gets, models, and other web pages."""

from __future__ import annotations

import http.server
import shutil
import threading
from pathlib import Path

import pytest

from edge_runtime.models import bundled as bundled_model
from tests.browser.steps import SUMMARIZE, composer, last_reply, replies, send, settled, until
from tests.hub_server import HubServer

LONG = (
    "SAY:# Results\n\nA reply with `code`, a list and a table.\n\n- first\n- second\n\n| wide | table |\n|---|---|\n"
    "| a long cell with many words in it | another long cell with many words in it |\n\n```python\nprint('a long line "
    "that does not fit a narrow window at all, and scrolls instead')\n```\n"
)


def axe_violations(page) -> list[str]:
    """What axe-core finds wrong for people who use a screen reader."""
    package = pytest.importorskip("axe_playwright_python")
    [source] = Path(package.__file__).parent.rglob("axe.min.js")
    page.evaluate(source.read_text("utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
        for one in found["violations"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(scripted, pages, shot, theme):
    chat = scripted()
    page = pages(chat.server.link(), color_scheme=theme)
    shot(page, f"welcome-{theme}")
    send(page, LONG)
    page.mouse.move(0, 0)
    shot(page, f"conversation-{theme}")
    assert axe_violations(page) == []
    narrow = pages(chat.server.link(), width=360, height=740, color_scheme=theme)
    shot(narrow, f"welcome-{theme}-360")
    narrow.get_by_role("button", name="Show conversations").click()
    until(narrow, "getComputedStyle(document.querySelector('#sidebar')).visibility === 'visible'")
    narrow.wait_for_timeout(250)
    shot(narrow, f"drawer-{theme}-360")
    narrow.locator("#conversations .open").first.click()
    until(narrow, "document.querySelectorAll('article').length === 2")
    narrow.wait_for_timeout(250)
    shot(narrow, f"conversation-{theme}-360")
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
    assert narrow.evaluate(
        "document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth"
    )
    for name in ("System prompt and sampling", "Model: echo. Choose another"):
        narrow.get_by_role("button", name=name).click()
        narrow.get_by_role("dialog").wait_for()
        narrow.wait_for_timeout(100)
        shot(narrow, f"{name.split()[0].strip(':').lower()}-{theme}-360")
        assert narrow.evaluate("document.querySelector('dialog').scrollWidth") <= 360
        narrow.keyboard.press("Escape")
    send(narrow, "SAY:works here too")
    assert last_reply(narrow) == "works here too"
    assert axe_violations(narrow) == []


def test_the_theme_can_be_chosen_and_is_kept(scripted, pages):
    chat = scripted()
    page = pages(chat.server.link(), color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    for label in ("Theme: system", "Theme: light"):
        page.get_by_role("button", name=label).click()
    until(page, "document.documentElement.dataset.theme === 'dark'")
    assert page.evaluate(background) != light
    until(page, "fetch('/api/start').then(a => a.json()).then(found => found.settings.theme === 'dark')")
    fresh = pages(chat.server.link(), color_scheme="light")
    assert fresh.evaluate("document.documentElement.dataset.theme") == "dark"


def test_everything_by_keyboard(scripted, pages, shot):
    page = pages(scripted().server.link())
    keys = page.keyboard
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    assert page.evaluate(focused) == "Message", "one can type at once"
    keys.type("SAY:typed")
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    settled(page)
    assert last_reply(page) == "typed second line"
    keys.press("Alt+r")
    page.get_by_text("2 / 2").wait_for()
    settled(page)
    keys.press("Alt+e")
    editor = page.get_by_label("Edit your message")
    editor.wait_for()
    editor.fill("SAY:edited")
    keys.press("Control+Enter")
    until(page, "document.querySelector('article.user .bubble')?.textContent === 'SAY:edited'")
    settled(page)
    keys.press("Alt+c")
    until(page, "navigator.clipboard.readText().then(text => text === 'edited')")
    keys.press("Alt+n")
    page.locator("#welcome").wait_for()
    keys.press("Alt+ArrowDown")
    until(page, "document.querySelectorAll('article').length === 2")
    keys.press("Alt+s")
    page.get_by_role("dialog", name="This conversation").wait_for()
    keys.press("Escape")
    keys.press("Alt+m")
    page.get_by_role("dialog", name="Models").wait_for()
    keys.press("Escape")
    keys.press("Control+k")
    page.get_by_role("dialog", name="Search all conversations").wait_for()
    keys.press("Escape")
    keys.press("Control+/")
    page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
    shot(page, "shortcuts")
    assert axe_violations(page) == []
    keys.press("Escape")
    until(page, "!document.querySelector('dialog')")
    keys.press("Alt+b")
    until(page, "document.querySelector('#app').classList.contains('no-sidebar')")
    keys.press("Alt+b")
    keys.press("Alt+t")
    until(page, "document.documentElement.dataset.theme === 'light'")
    page.get_by_role("button", name="Conversation menu").focus()
    keys.press("Enter")
    page.get_by_role("menuitem", name="Rename").wait_for()
    keys.press("ArrowDown")
    assert page.evaluate(focused) == "Pin"
    keys.press("Escape")
    assert page.evaluate(focused) == "Conversation menu", "the focus goes back"


def test_a_screen_reader_is_told(scripted, pages):
    page = pages(scripted().server.link())
    page.evaluate("""(() => {
      window.told = [];
      const region = document.querySelector('#announcer');
      new MutationObserver(() => region.textContent && window.told.push(region.textContent))
        .observe(region, {childList: true, characterData: true, subtree: true});
    })()""")
    send(page, "SAY:an answer")
    until(page, "window.told.includes('Reply: an answer')")
    tree = page.locator("body").aria_snapshot()
    for part in (
        'navigation "Conversations"',
        'main "Conversation"',
        'region "Messages"',
        'article "You"',
        'article "Reply by echo"',
        'textbox "Message"',
        'button "Send"',
        'img "KV cache',
    ):
        assert part in tree, part


def test_models_are_picked_with_a_fit_estimate_and_progress(start, pages, tmp_path, shot):
    file = tmp_path / "another-q4_0.gguf"
    shutil.copy(bundled_model.path(), file)
    page = pages(start().link)
    until(page, "document.querySelector('#model-name').textContent === 'edge-tiny'")
    page.get_by_role("button", name="Model:").click()
    row = page.locator("[data-model='edge-tiny']")
    row.get_by_text("Fits: needs").wait_for()
    row.get_by_text("Plan", exact=True).click()
    assert "weights" in row.locator("table").inner_text()
    page.get_by_label("Path of a GGUF file").fill(str(file))
    page.get_by_role("button", name="Add", exact=True).click()
    added = page.locator("[data-model='another-q4_0']")
    added.get_by_text("Fits: needs").wait_for()
    shot(page, "models")
    stages = page.evaluate_handle("""(() => {
      const seen = new Set();
      const bar = document.querySelector('#load-bar');
      new MutationObserver(() => { if (!bar.hidden) seen.add(bar.getAttribute('aria-valuetext') || ''); })
        .observe(bar, {attributes: true});
      return seen;
    })()""")
    added.get_by_role("button", name="Open another-q4_0").click()
    page.locator("[data-model='another-q4_0'].current").wait_for()
    assert any("Loading weights" in text for text in stages.evaluate("seen => [...seen]"))
    page.keyboard.press("Escape")
    send(page, SUMMARIZE)
    assert "08:40" in last_reply(page)
    assert replies(page).last.get_attribute("aria-label") == "Reply by another-q4_0"


def test_a_broken_model_file_is_refused_and_the_open_one_stays(start, pages, tmp_path):
    bad = tmp_path / "broken.gguf"
    bad.write_bytes(b"GGUF" + b"\xff" * 100)
    page = pages(start().link)
    until(page, "document.querySelector('#model-name').textContent === 'edge-tiny'")
    page.get_by_role("button", name="Model:").click()
    page.get_by_label("Path of a GGUF file").fill(str(bad))
    page.get_by_role("button", name="Add", exact=True).click()
    row = page.locator("[data-model='broken']")
    row.get_by_text("corrupt at byte").wait_for()
    assert row.get_by_role("button", name="Open broken").is_disabled()
    page.get_by_label("Path of a GGUF file").fill("/nowhere/at/all.gguf")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_text("no such file").wait_for()
    page.keyboard.press("Escape")
    send(page, "Hello")
    pages.tolerant = True  # the browser logs the 404


def test_a_model_is_pulled_from_a_hub(start, pages, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.add("org/tiny-GGUF", {"tiny-Q4_0.gguf": bundled_model.path().read_bytes()})
        hub.bytes_per_second = 3e5
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        page = pages(start().link)
        page.get_by_role("button", name="Model:").click()
        page.get_by_label("Model on the hub").fill("org/tiny-GGUF:Q4_0")
        page.get_by_role("button", name="Pull", exact=True).click()
        page.get_by_role("progressbar", name="Download").wait_for()
        hub.bytes_per_second = None
        page.get_by_text("org/tiny-GGUF:Q4_0 was pulled").wait_for()
        page.get_by_role("button", name="Open org/tiny-GGUF:Q4_0").click()
        page.locator("[data-model='org/tiny-GGUF:Q4_0'].current").wait_for()
        page.get_by_label("Model on the hub").fill("org/nothing")
        page.get_by_role("button", name="Pull", exact=True).click()
        page.locator("#pull-state .problem").wait_for()


def test_other_web_pages_cannot_talk_to_the_chat(scripted, pages):
    chat = scripted()
    page = pages(chat.server.link())
    send(page, "SAY:secret")

    class Other(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>other</title>")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    other = page.context.new_page()  # the same browser: it has the cookie, and 127.0.0.1 is the same site
    other.goto(f"http://127.0.0.1:{server.server_port}/")
    url = chat.server.url
    tries = other.evaluate(
        """async (url) => {
      const found = {};
      const attempt = async (name, work) => {
        try { found[name] = await work(); } catch (error) { found[name] = "refused"; }
      };
      await attempt("read", async () => (await fetch(`${url}/api/start`, {credentials: "include"})).text());
      await attempt("write", async () => (await fetch(`${url}/api/folders`, {method: "POST", credentials: "include",
        body: '{"name": "theirs"}'})).text());
      await attempt("blind", async () => (await fetch(`${url}/api/folders`, {method: "POST", credentials: "include",
        mode: "no-cors", body: '{"name": "theirs"}'})).type);
      await attempt("module", async () => Object.keys(await import(`${url}/web/js/state.js`)).join());
      const frame = document.createElement("iframe");
      frame.src = url;
      document.body.append(frame);
      await new Promise((done) => { frame.onload = done; setTimeout(done, 1000); });
      try { found.frame = frame.contentDocument ? "readable" : "refused"; } catch { found.frame = "refused"; }
      return found;
    }""",
        url,
    )
    assert tries["read"] == tries["write"] == tries["module"] == tries["frame"] == "refused", tries
    assert chat("GET", "start")["folders"] == [], "the blind write did nothing either"
    server.shutdown()
    pages.tolerant = True


def test_typing_is_not_lost_when_conversations_are_switched(scripted, pages):
    page = pages(scripted().server.link())
    send(page, "SAY:one")
    composer(page).fill("for the first")
    page.get_by_role("button", name="New chat").click()
    until(page, "document.querySelector('#composer-text').value === ''")
    composer(page).fill("for a new one")
    page.get_by_role("button", name="SAY:one", exact=True).click()
    until(page, "document.querySelector('#composer-text').value === 'for the first'")
    page.get_by_role("button", name="New chat").click()
    until(page, "document.querySelector('#composer-text').value === 'for a new one'")
    page.get_by_role("img", name="Has a draft").wait_for()
