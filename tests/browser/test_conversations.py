"""Conversations in the page: branches, forks, search, names, pins, folders, presets, attachments, export, import."""

from __future__ import annotations

import json

import pypdfium2
import pytest

from tests.browser.steps import (
    REPORT,
    composer,
    conversation_rows,
    last_reply,
    menu,
    replies,
    send,
    settled,
    tool,
    until,
)


@pytest.fixture
def page(scripted, pages):
    chat = scripted()
    found = pages(chat.server.link())
    found.chat = chat
    return found


def test_edit_makes_a_branch_and_one_can_switch(page, shot):
    send(page, "SAY:first")
    question = page.locator("article.user").last
    tool(page, question, "Edit as a new version")
    editor = page.get_by_label("Edit your message")
    assert editor.input_value() == "SAY:first"
    editor.fill("SAY:second")
    page.get_by_role("button", name="Send as new version").click()
    page.get_by_text("2 / 2").wait_for()
    settled(page)
    assert last_reply(page) == "second"
    shot(page, "branches")
    tool(page, page.locator("article.user").last, "Previous version")
    page.get_by_text("1 / 2").wait_for()
    assert last_reply(page) == "first"
    tool(page, page.locator("article.user").last, "Next version")
    page.get_by_text("2 / 2").wait_for()
    assert last_reply(page) == "second"


def test_regenerate_fork_and_delete_a_branch(page):
    send(page, "SAY:again")
    tool(page, replies(page).last, "Regenerate")
    page.get_by_text("2 / 2").wait_for()
    settled(page)
    send(page, "SAY:more")
    tool(page, replies(page).first, "Fork into a new conversation")
    until(page, "document.querySelector('#title').textContent.endsWith('(fork)')")
    assert page.locator("article").count() == 2
    assert conversation_rows(page) == ["SAY:again (fork)", "SAY:again"]
    page.locator("#conversations .open").last.click()
    until(page, "document.querySelectorAll('article').length === 4")
    tool(page, replies(page).first, "Delete this branch")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    until(page, "document.querySelectorAll('article').length === 2")
    assert last_reply(page) == "again"
    assert page.get_by_text("2 / 2").count() == 0


def test_cancelling_an_edit_leaves_all_as_it_was(page):
    send(page, "SAY:one")
    tool(page, page.locator("article.user").last, "Edit as a new version")
    page.get_by_label("Edit your message").fill("changed")
    page.keyboard.press("Escape")
    assert page.locator("article.user .bubble").inner_text() == "SAY:one"
    assert page.locator("article").count() == 2


def test_search_over_everything(page, shot):
    send(page, "SAY:the albatross flew south")
    page.get_by_role("button", name="New chat").click()
    send(page, "SAY:something else")
    page.get_by_role("button", name="Search all conversations").click()
    page.get_by_role("combobox").fill("albatro")
    page.get_by_role("option").nth(1).wait_for()
    assert "albatross" in page.locator(".hit mark").first.inner_text()
    shot(page, "search")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#title').textContent.includes('albatross')")
    page.keyboard.press("Control+k")
    page.get_by_role("combobox").fill("nowhere to be found")
    page.get_by_text("Nothing found").wait_for()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0


def test_rename_pin_folders_delete(page, shot):
    send(page, "SAY:one")
    page.get_by_role("button", name="New chat").click()
    send(page, "SAY:two")
    menu(page, page.get_by_role("button", name="Menu of SAY:one"), "Rename")
    page.get_by_role("textbox", name="Title").fill("A better name")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="A better name", exact=True).wait_for()
    menu(page, page.get_by_role("button", name="Menu of A better name"), "Pin")
    page.get_by_role("region", name="Pinned").wait_for()
    assert conversation_rows(page)[0] == "A better name"
    page.get_by_role("button", name="New folder").click()
    page.get_by_role("textbox", name="Name").fill("Work")
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Work").wait_for()
    menu(page, page.get_by_role("button", name="Menu of SAY:two"), "Move to folder")
    page.get_by_role("menuitem", name="Work").click()
    page.get_by_role("region", name="Work").get_by_role("button", name="SAY:two", exact=True).wait_for()
    shot(page, "sidebar")
    menu(page, page.get_by_role("button", name="Folder Work"), "New chat here")
    send(page, "SAY:three")
    page.get_by_role("region", name="Work").get_by_role("button", name="SAY:three", exact=True).wait_for()
    menu(page, page.get_by_role("button", name="Folder Work"), "Rename")
    page.get_by_role("textbox", name="Name").fill("Home")
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Home").wait_for()
    menu(page, page.get_by_role("button", name="Folder Home"), "Delete folder")
    page.get_by_role("button", name="Delete folder").click()
    until(page, "!document.querySelector('#conversations [aria-label=Home]')")
    assert len(conversation_rows(page)) == 3, "its conversations stay"
    menu(page, page.get_by_role("button", name="Conversation menu"), "Delete")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    until(page, "document.querySelectorAll('#conversations .open').length === 2")
    assert page.locator("#welcome").is_visible()


def test_system_prompt_and_sampling_presets(page, pages, shot):
    send(page, "SAY:abcdefghij")
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("System prompt", exact=True).fill("Be brief.")
    page.get_by_label("Most tokens").fill("4")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Save as preset").click()
    page.get_by_role("textbox", name="Name").fill("Short")
    page.keyboard.press("Enter")
    page.get_by_text("Preset “Short” saved").wait_for()
    assert page.get_by_label("Preset").evaluate("node => node.selectedOptions[0].text") == "Short"
    shot(page, "settings")
    page.get_by_label("Temperature").fill("-1")
    page.get_by_role("alert").filter(has_text="must be a finite number from 0 up").wait_for()
    pages.tolerant = True  # the browser logs the 400
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Close").click()
    tool(page, replies(page).last, "Regenerate")
    page.get_by_text("longest allowed length").wait_for()
    settled(page)
    assert last_reply(page) == "abcd"
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="System prompt and sampling").click()
    with page.expect_response("**/api/settings"):
        page.get_by_label("Preset").select_option("Short")
    page.get_by_role("button", name="Close").click()
    send(page, "SAY:klmnopqrst")
    assert last_reply(page) == "klmn", "new conversations begin with the chosen preset"
    page.get_by_role("button", name="System prompt and sampling").click()
    assert page.get_by_label("System prompt", exact=True).input_value() == "Be brief."
    page.get_by_role("button", name="Delete preset").click()
    until(page, "![...document.querySelector('#preset').options].some((one) => one.text === 'Short')")


def pdf_bytes(folder) -> bytes:
    """A PDF of one page without text."""
    document = pypdfium2.PdfDocument.new()
    document.new_page(200, 200)
    path = folder / "made.pdf"
    document.save(str(path))
    return path.read_bytes()


TEXT_PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>endobj\n"
    b"4 0 obj<</Length 51>>stream\nBT /F1 18 Tf 72 700 Td (SAY:words of a PDF) Tj ET   \nendstream endobj\n"
    b"5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj\ntrailer<</Root 1 0 R>>\n"
)


def test_attachments_text_markdown_pdf_and_their_refusals(page, pages, tmp_path, shot):
    (tmp_path / "notes.md").write_text("# Notes\n\nsome notes")
    (tmp_path / "report.pdf").write_bytes(TEXT_PDF)
    (tmp_path / "empty.pdf").write_bytes(pdf_bytes(tmp_path))
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02\xff")
    choose = page.locator("#file-input")
    choose.set_input_files([str(tmp_path / name) for name in ("notes.md", "report.pdf")])
    page.get_by_role("button", name="Show report.pdf").wait_for()
    choose.set_input_files([str(tmp_path / "binary.txt")])
    page.get_by_text("is binary, not text").wait_for()
    choose.set_input_files([str(tmp_path / "empty.pdf")])
    page.get_by_text("holds no text").wait_for()
    shot(page, "attachments")
    pages.tolerant = True  # the browser logs the refusals
    page.get_by_role("button", name="Show report.pdf").click()
    assert "words of a PDF" in page.locator(".file-text").inner_text()
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Remove notes.md").click()
    until(page, "document.querySelectorAll('#composer-files li').length === 1")
    composer(page).press("Enter")
    settled(page)
    assert "words of a PDF" in last_reply(page), "the model got the file's text"
    assert page.locator("article.user .file .name").inner_text() == "report.pdf"
    assert page.locator("#composer-files").is_hidden()


def test_a_long_paste_becomes_an_attachment(page):
    composer(page).focus()
    long = f"SAY:pasted\n{REPORT * 8}"
    page.evaluate("text => navigator.clipboard.writeText(text)", long)
    page.keyboard.press("Control+v")
    page.get_by_role("button", name="Show Pasted text 1.txt").wait_for()
    assert composer(page).input_value() == ""
    page.evaluate("text => navigator.clipboard.writeText(text)", "short")
    page.keyboard.press("Control+v")
    until(page, "document.querySelector('#composer-text').value === 'short'")


def test_a_dropped_file_is_attached(page):
    page.evaluate("""() => {
      const data = new DataTransfer();
      data.items.add(new File(["dropped text"], "dropped.txt", { type: "text/plain" }));
      for (const name of ["dragenter", "dragover", "drop"]) {
        window.dispatchEvent(new DragEvent(name, { dataTransfer: data, bubbles: true, cancelable: true }));
      }
    }""")
    page.get_by_role("button", name="Show dropped.txt").wait_for()
    assert page.locator("#drop").is_hidden()


def test_export_and_import(page, tmp_path):
    send(page, "SAY:**to be** exported")
    with page.expect_download() as download:
        menu(page, page.get_by_role("button", name="Conversation menu"), "Export as Markdown")
    markdown = tmp_path / download.value.suggested_filename
    download.value.save_as(markdown)
    assert markdown.suffix == ".md" and "## Assistant\n\n**to be** exported" in markdown.read_text()
    with page.expect_download() as download:
        menu(page, page.get_by_role("button", name="Conversation menu"), "Export as JSON")
    one = tmp_path / "one.json"
    download.value.save_as(one)
    assert json.loads(one.read_text())["conversations"][0]["messages"][1]["content"] == "**to be** exported"
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all conversations").click()
    assert download.value.suggested_filename.endswith(".json")
    page.locator("#import-input").set_input_files([str(one), str(markdown)])
    until(page, "document.querySelectorAll('#conversations .open').length === 3")
    assert last_reply(page) == "to be exported"


def test_an_import_that_is_none_is_refused(page, tmp_path, pages):
    (tmp_path / "x.json").write_text('{"a": 1}')
    page.locator("#import-input").set_input_files(str(tmp_path / "x.json"))
    page.get_by_text("no export of this chat").wait_for()
    pages.tolerant = True  # the browser logs the 422
