"""Nothing typed is lost: kill -9 of the server and of the page, restarts, a second process, a server that is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import psutil
import pytest

from tests.browser.steps import SUMMARIZE, composer, last_reply, replies, send, settled, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def saved_draft(page, text, key="new"):
    """Until the server has the draft."""
    until(page, f"fetch('/api/drafts/{key}').then(a => a.json()).then(d => d.text === {text!r})")


def test_a_draft_survives_kill_9_of_the_server_and_a_new_browser(start, pages, tmp_path):
    chat = start()
    page = pages(chat.link)
    composer(page).fill("half a thought")
    (tmp_path / "note.txt").write_text("an attachment")
    page.locator("#file-input").set_input_files(str(tmp_path / "note.txt"))
    page.get_by_role("button", name="Show note.txt").wait_for()
    saved_draft(page, "half a thought")
    chat.kill()
    again = start()
    fresh = pages(again.link)  # a profile without this page's localStorage
    assert composer(fresh).input_value() == "half a thought"
    assert fresh.get_by_role("button", name="Show note.txt").is_visible()
    pages.tolerant = True  # the old page's connection broke


def on_disk(folder) -> str:
    """What the last message has come to in the database."""
    with contextlib.closing(sqlite3.connect(f"file:{folder}/chat.sqlite3?mode=ro", uri=True)) as database:
        return str(database.execute("SELECT content FROM messages ORDER BY id DESC").fetchone()[0])


def test_a_reply_survives_kill_9_of_the_server_and_goes_on(start, pages, shot):
    chat = start(delay=0.03)
    page = pages(chat.link)
    whole = " ".join(str(number) for number in range(400))  # more than half a minute
    send(page, f"SAY:{whole}", wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 30")
    seen = last_reply(page)
    page.wait_for_timeout(1000)  # ten rounds of saving
    assert on_disk(chat.folder).startswith(seen)
    chat.kill()
    page.get_by_text("does not answer").first.wait_for()
    composer(page).fill("typed while the server was dead")
    shot(page, "server-gone")
    fresh = pages(start(delay=0).link)
    fresh.locator("#conversations .open").first.click()
    until(fresh, "document.querySelectorAll('article').length === 2")
    kept = last_reply(fresh)
    assert kept.startswith(seen) and whole.startswith(kept) and kept != whole, (seen, kept)
    assert fresh.get_by_text("This reply was interrupted").is_visible()
    shot(fresh, "interrupted")
    fresh.get_by_role("button", name="Continue").click()
    until(fresh, "!document.querySelector('.notice')")
    settled(fresh)
    assert last_reply(fresh) == whole
    pages.tolerant = True


def test_what_was_typed_while_the_server_was_dead_arrives_when_it_is_back(start, pages):
    chat = start()
    page = pages(chat.link)
    composer(page).fill("before")
    saved_draft(page, "before")
    chat.kill()
    page.get_by_text("does not answer").first.wait_for()
    composer(page).fill("before and after")
    composer(page).press("Enter")
    page.get_by_text("nothing was sent").wait_for()
    assert composer(page).input_value() == "before and after"
    again = start()
    assert again.link.split("/open/")[0] == chat.link.split("/open/")[0], "the same port, so the same page goes on"
    other = pages.open(page.context, again.link)  # the same browser: its cookie serves the old page too
    until(page, "document.querySelector('#banner').hidden")
    saved_draft(page, "before and after")
    other.close()
    page.reload()
    until(page, "document.documentElement.dataset.ready")
    assert composer(page).input_value() == "before and after"
    pages.tolerant = True


def renderer_of(page, pids) -> int:
    """The process that draws the page: the one that works when it does. The browser keeps others ready for new pages,
    and a page that is given one that was killed never opens."""
    processes = [psutil.Process(int(pid)) for pid in pids]
    before = [process.cpu_times().user for process in processes]
    page.evaluate("{ const began = performance.now(); while (performance.now() - began < 400); }")
    worked = [process.cpu_times().user - start for process, start in zip(processes, before)]
    return processes[worked.index(max(worked))].pid


def test_kill_9_of_the_page_loses_nothing_and_the_reply_goes_on(paced, browser, pages):
    chat, pace = paced(steps=20)
    page = pages(chat.server.link())
    send(page, "SAY:" + "word " * 30, wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 5")
    composer(page).fill("next question")
    session = browser.new_browser_cdp_session()
    found = session.send("SystemInfo.getProcessInfo")
    renderer = renderer_of(page, [one["id"] for one in found["processInfo"] if one["type"] == "renderer"])
    page.wait_for_timeout(100)  # sooner than the draft's way to the server: what the browser kept must do, or it came
    os.kill(renderer, signal.SIGKILL)
    again = pages.open(page.context, chat.server.link())
    again.locator("#conversations .open").first.click()
    until(again, "document.querySelectorAll('article').length === 2")
    until(again, "document.querySelector('#composer-text').value === 'next question'")
    assert last_reply(again).startswith("word word") and again.locator("#stop").is_visible()
    pace.go_on()
    settled(again)
    assert last_reply(again) == ("word " * 30).strip()
    pages.tolerant = True


def test_a_reload_in_the_middle_of_a_reply_goes_on_where_it_is(paced, pages):
    chat, pace = paced(steps=20)
    page = pages(chat.server.link())
    send(page, "SAY:" + "word " * 40, wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 5")
    page.reload()
    until(page, "document.documentElement.dataset.ready")
    assert last_reply(page).startswith("word word") and page.locator("#stop").is_visible()
    pace.go_on()
    settled(page)
    assert last_reply(page) == ("word " * 40).strip()


def test_two_pages_see_the_same(paced, pages):
    chat, pace = paced(steps=30)
    one, two = pages(chat.server.link()), pages(chat.server.link())
    send(one, "SAY:shared words")
    two.get_by_role("button", name="SAY:shared words", exact=True).click()
    until(two, "document.querySelectorAll('article').length === 2")
    assert last_reply(two) == "shared words"
    send(one, "SAY:" + "more words " * 9, wait=False)
    for page in (one, two):
        until(page, "document.querySelectorAll('article.assistant')[1]?.querySelector('.prose').innerText.length > 5")
        assert page.locator("#stop").is_visible()
    pace.go_on()
    for page in (one, two):
        settled(page)
        assert last_reply(page) == ("more words " * 9).strip()


def test_an_edit_in_progress_is_a_draft_of_its_own(start, pages):
    chat = start()
    page = pages(chat.link)
    send(page, "Hello")
    page.locator("article.user").hover()
    page.get_by_role("button", name="Edit as a new version").click()
    page.get_by_label("Edit your message").fill("Hello again, edited")
    saved_draft(page, "Hello again, edited", key="e:1")
    chat.kill()
    fresh = pages(start().link)
    fresh.locator("#conversations .open").first.click()
    until(fresh, "document.querySelectorAll('article').length === 2")
    fresh.locator("article.user").hover()
    fresh.get_by_role("button", name="Edit as a new version").click()
    assert fresh.get_by_label("Edit your message").input_value() == "Hello again, edited"
    pages.tolerant = True


def test_a_second_chat_on_the_same_folder_hands_over_the_first_ones_page(start, pages):
    chat = start()
    second = subprocess.run(
        [sys.executable, "-m", "edge_runtime.cli", "chat", "--no-open", "--data", str(chat.folder)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 0, second.stderr
    link = second.stderr.strip().rpartition(" ")[2]
    assert "running already" in second.stderr and link.startswith(chat.link.split("/open/")[0])
    page = pages(link)
    send(page, "Hello")
    assert replies(page).count() == 1


def test_sigterm_ends_it_and_keeps_the_text(start, pages):
    chat = start()
    page = pages(chat.link)
    send(page, SUMMARIZE, wait=False)
    until(page, "document.querySelector('article.assistant .prose')?.innerText.length > 10")
    seen = last_reply(page)
    chat.process.send_signal(signal.SIGTERM)
    assert chat.process.wait(20) == 0
    fresh = pages(start().link)
    fresh.locator("#conversations .open").first.click()
    until(fresh, "document.querySelectorAll('article').length === 2")
    assert len(seen) > 10 and last_reply(fresh).startswith(seen), "all that was seen, whether it was the end or not"
    assert fresh.get_by_text("This reply was interrupted").count() == 0, "stopped in order"
    pages.tolerant = True
