"""Replies in the page: streaming Markdown, code, reasoning, stop, continue, errors; a model's output is not trusted."""

from __future__ import annotations

from edge_runtime.offload.hybrid_status import HybridStatus
from tests.browser.steps import SUMMARIZE, composer, last_reply, replies, send, settled, tool, until

MARKDOWN = """# Heading

Some **bold**, *italic*, `code`, a [link](https://example.org/x).

- one
- two

| a | b |
|---|---|
| 1 | 2 |

```python
def add(a, b):
    return a + b  # sum
```

> quoted
"""
HOSTILE = """<script>window.stolen = 1</script><img src=x onerror="window.stolen = 2">

![tracker](https://evil.example/pixel.png) <img src="https://evil.example/two.png" alt="two">

[click](javascript:window.stolen=3) <a href="JaVaScRiPt:window.stolen=4" onclick="window.stolen=5">here</a>

<iframe src="https://evil.example"></iframe><svg onload="window.stolen=6"><circle/></svg>

<form action="https://evil.example"><input name="q" onfocus="window.stolen=7" autofocus></form>

<style>body { display: none }</style>
<div style="position:fixed" id="composer" class="toast" onmouseover="window.stolen=8">text</div>

<math><mtext><table><mglyph><style><img src=x onerror="window.stolen=9">

[data](data:text/html,<script>window.stolen=10</script>)
"""


def test_markdown_streams_with_highlighted_code_and_copy(paced, pages, shot):
    chat, pace = paced(steps=60)
    page = pages(chat.server.link())
    send(page, f"SAY:{MARKDOWN}", wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 20")
    assert page.locator("#stop").is_visible(), "it streams"
    pace.go_on()
    settled(page)
    reply = replies(page).last
    assert reply.locator("h1").inner_text() == "Heading"
    assert reply.locator("strong").inner_text() == "bold"
    assert reply.locator("li").all_inner_texts() == ["one", "two"]
    assert reply.locator("td").all_inner_texts() == ["1", "2"]
    assert reply.locator("pre .hljs-keyword").all_inner_texts() == ["def", "return"]
    assert reply.locator(".code-head span").first.inner_text() == "python"
    link = reply.locator("a")
    assert (link.get_attribute("href"), link.get_attribute("target")) == ("https://example.org/x", "_blank")
    assert "noopener" in link.get_attribute("rel")
    reply.get_by_role("button", name="Copy python code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "def add(a, b):\n    return a + b  # sum"
    tool(page, reply, "Copy text")
    assert page.evaluate("navigator.clipboard.readText()").strip() == MARKDOWN.strip()
    shot(page, "markdown-light")


def test_hostile_output_is_harmless(scripted, pages, shot):
    asked: list[str] = []
    chat = scripted()
    page = pages(chat.server.link())
    page.on("request", lambda request: asked.append(request.url))
    send(page, f"SAY:{HOSTILE}")
    page.mouse.move(400, 300)
    page.wait_for_timeout(300)
    assert page.evaluate("window.stolen") is None
    assert all(url.startswith(chat.server.url) for url in asked), asked
    reply = replies(page).last
    for bad in (
        "script",
        "img",
        "iframe",
        "svg[onload]",
        "form",
        "style",
        "[style]",
        "[onclick]",
        "[onerror]",
        "[onmouseover]",
        "[id]",
        "[autofocus]",
        ".prose .toast",
    ):
        assert reply.locator(f".prose {bad}").count() == 0, bad
    hrefs = [link.get_attribute("href") or "" for link in reply.locator(".prose a").all()]
    assert "https://evil.example/pixel.png" in hrefs and "https://evil.example/two.png" in hrefs, "images become links"
    assert not any("script" in href.lower() or href.startswith("data:") for href in hrefs), hrefs
    assert page.locator("#composer").count() == 1 and composer(page).is_visible()
    shot(page, "hostile-output")
    page.reload()
    until(page, "document.documentElement.dataset.ready")
    page.wait_for_timeout(200)
    assert page.evaluate("window.stolen") is None
    pages.tolerant = True  # the policy reports what DOMPurify's inert parser met


def test_a_question_with_html_in_it_stays_text(scripted, pages):
    page = pages(scripted().server.link())
    send(page, "<img src=x onerror='window.stolen=1'><b>SAY:ok")
    assert page.locator("article.user .bubble").inner_text().startswith("<img src=x")
    assert page.locator("article.user .bubble *").count() == 0
    assert page.title().startswith("<img")
    assert page.evaluate("window.stolen") is None


def test_reasoning_is_collapsed_and_opens(paced, pages, shot):
    chat, pace = paced(steps=25)
    page = pages(chat.server.link())
    send(page, "SAY:<think>\nFirst I weigh **both** sides.\n</think>\n\nThe answer is 4.", wait=False)
    page.get_by_text("Thinking…").wait_for()
    pace.go_on()
    settled(page)
    assert last_reply(page) == "The answer is 4."
    hidden = page.locator(".thinking").get_by_text("First I weigh")
    assert not hidden.is_visible()
    page.get_by_text("Reasoning", exact=True).click()
    assert hidden.is_visible()
    assert page.locator(".thinking strong").inner_text() == "both"
    shot(page, "reasoning")


def test_stop_at_once_text_kept_then_continue(paced, pages, shot):
    chat, pace = paced(seconds=0.03)
    page = pages(chat.server.link())
    text = " ".join(str(number) for number in range(400))  # more than half a minute
    send(page, f"SAY:{text}", wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 5")
    page.get_by_role("button", name="Stop the reply").click()
    page.get_by_text("Stopped.").wait_for()
    settled(page)
    kept = last_reply(page)
    assert 5 < len(kept) < len(text) and text.startswith(kept)
    shot(page, "stopped")
    pace.go_on()
    page.get_by_role("button", name="Continue").click()
    until(page, "!document.querySelector('.notice')")
    settled(page)
    assert last_reply(page) == text


def test_escape_stops_too(paced, pages):
    chat, _ = paced(seconds=0.03)
    page = pages(chat.server.link())
    send(page, "SAY:" + "word " * 300, wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 5")
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()


def test_errors_say_what_to_do(scripted, pages, shot):
    page = pages(scripted().server.link())
    send(page, "x" * 6000)
    alert = page.get_by_role("alert").filter(has_text="exceed the context")
    assert "Shorten the prompt" in alert.inner_text()
    assert page.get_by_role("button", name="Try again").is_visible()
    shot(page, "context-error")


def test_a_lost_device_is_said_until_it_is_read_or_the_model_is_opened_again(paced, pages, shot):
    chat, pace = paced(steps=30)
    device, lost = chat.server.app.state.chat.models.host.llm.engine.device, 0
    device.status = lambda: HybridStatus("onnx:cpu", None, 0, 0, {}, 0.0, lost, 0, ())
    page = pages(chat.server.link())
    notice = page.locator("#notice")
    send(page, "SAY:" + "word " * 30, wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 20")
    assert not notice.is_visible()
    lost = 1
    pace.go_on()
    until(page, "!document.querySelector('#notice').hidden")
    settled(page)
    assert "was lost" in notice.inner_text() and "onnx:cpu goes on" in notice.inner_text()
    assert notice.get_attribute("role") == "status"
    assert last_reply(page).strip() == ("word " * 30).strip(), "the reply goes on"
    shot(page, "lost-device")
    notice.get_by_role("button", name="Dismiss").click()
    send(page, "SAY:more")
    assert not notice.is_visible(), "said once"
    lost = 2
    send(page, "SAY:another")
    until(page, "!document.querySelector('#notice').hidden")
    lost = 0  # another model
    send(page, "SAY:last")
    until(page, "document.querySelector('#notice').hidden")


def test_the_bundled_model_answers_with_figures(bundled, pages, shot):
    page = pages(bundled.server_link())
    send(page, SUMMARIZE)
    assert "08:40" in last_reply(page) and "Ravi Okafor" in last_reply(page), "greedy, as the model card says"
    assert "tok/s" in page.locator("#stat-speed").inner_text() and "–" not in page.locator("#stat-speed").inner_text()
    assert any(unit in page.locator("#stat-first").inner_text() for unit in ("ms", " s"))
    used, limit = page.locator("#stat-context-text").inner_text().split(" / ")
    assert int(used) > 80 and limit == "2,048"
    assert "host only" in page.locator("#kv-text").inner_text()
    assert float(page.locator("#kv-host").get_attribute("width")) > 0
    assert page.locator("#kv-device").get_attribute("width") == "0"
    assert "in host memory" in page.get_by_role("img", name="KV cache").get_attribute("aria-label")
    shot(page, "bundled-summary")
