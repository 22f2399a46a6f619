"""Search, attachments, export and import, prompts: what the chat does with texts."""

from __future__ import annotations

import json
import time

import pytest

from edge_runtime.apps.chat import attachments, conversations, drafts, exchange, prompts, search, tree
from edge_runtime.apps.chat.errors import AttachmentError, ImportFileError
from edge_runtime.apps.chat.store import Store
from edge_runtime.models import bundled

EXPORT = '{"format": "edge-runtime-chat", "version": 1, "conversations":'


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def add(store, *texts, title="t"):
    key, parent, ids = conversations.create(store, title), None, []
    for i, text in enumerate(texts):
        parent = tree.add(store, key, parent, ("user", "assistant")[i % 2], text)
        ids.append(parent)
    return key, ids


def test_search_finds_titles_messages_attachments_in_all_branches(store):
    key, ids = add(store, "the harbour was closed", "storm warning", title="Weather diary")
    tree.add(store, key, ids[0], "assistant", "another version about lighthouses")
    attachments.add(store, "new", "notes.txt", b"ferries were cancelled")
    attachments.send(store, "new", ids[0])
    for query, kind, message in [
        ("harbour", "message", ids[0]),
        ("storm", "message", ids[1]),
        ("diary", "title", None),
        ("ferries", "attachment", ids[0]),
        ("lighth", "message", ids[1] + 1),
    ]:
        hits = search.find(store, query)
        assert [(hit["kind"], hit["message"], hit["conversation"]) for hit in hits] == [(kind, message, key)], query
    assert "\x02harbour\x03" in search.find(store, "HARBOUR")[0]["excerpt"]


def test_search_takes_whatever_is_typed(store):
    add(store, 'say "hello there" AND (then) NOT* go: foo-bar C++ naïve café 50%')
    for query in [
        '"hello there"',
        "hello",
        "AND",
        "(then",
        "NOT*",
        "foo-bar",
        "c++",
        "naive cafe",
        '"',
        "''",
        "a:b*",
        "^x",
        "50%",
    ]:
        search.find(store, query)
    assert len(search.find(store, "naive cafe")) == 1
    assert search.find(store, '"there hello"') == []
    assert search.find(store, "   ") == search.find(store, "()") == []


def test_search_in_scripts_without_spaces(store):
    key, _ = add(store, "今日は港が閉まっていた。嵐の警報が出た。")
    hits = search.find(store, "嵐の警報")
    assert hits[0]["conversation"] == key and "\x02嵐の警報\x03" in hits[0]["excerpt"]


def test_search_follows_changes_and_leaves_streaming_replies_out(store):
    key, ids = add(store, "question")
    reply = tree.add(store, key, ids[0], "assistant", "zebra", status="streaming")
    tree.save(store, reply, "zebra giraffe")
    assert search.find(store, "zebra") == []
    tree.save(store, reply, "zebra giraffe", status="complete")
    assert len(search.find(store, "giraffe")) == 1
    conversations.change(store, key, {"title": "Renamed okapi"})
    assert len(search.find(store, "okapi")) == 1
    tree.delete_branch(store, reply)
    assert search.find(store, "zebra") == []
    conversations.delete(store, key)
    assert store.row("SELECT count(*) AS n FROM search")["n"] == 0


@pytest.mark.parametrize(
    "name, raw, reason",
    [
        ("a.txt", b"\x00\x01\x02\xff binary", "binary"),
        ("a.txt", "caf\xe9".encode("latin-1"), "UTF-8"),
        ("empty.md", b"  \n", "no text"),
        ("a.pdf", b"%PDF-1.4 nothing", "PDF"),
        ("..", b"", "no text"),
    ],
)
def test_files_that_cannot_be_attached_say_why(store, name, raw, reason):
    with pytest.raises(AttachmentError, match=reason):
        attachments.add(store, "new", name, raw)
    assert drafts.get(store, "new")["attachments"] == []


def test_attachments_are_read_and_named_safely(store):
    found = attachments.add(store, "new", "../../etc/pass\\wd.txt", "zwölf\r\n".encode("utf-16"))
    assert found["name"] == "wd.txt" and attachments.get(store, found["id"])["text"].strip() == "zwölf"
    too_long = b"x" * (attachments.MAX_CHARACTERS + 1)
    with pytest.raises(AttachmentError, match="the limit is"):
        attachments.add(store, "new", "a.txt", too_long)


def test_export_and_import_keep_the_whole_tree(store):
    key, ids = add(store, "q", "one", title="Über alles")
    tree.save(store, ids[1], "one", status="stopped", stats={"ttft": 0.5}, model="m")
    tree.add(store, key, ids[0], "assistant", "two")
    attachments.add(store, "new", "f.md", b"# Heading\n")
    attachments.send(store, "new", ids[0])
    tree.select(store, ids[1])
    conversations.change(store, key, {"system_prompt": "Be brief.", "sampling": {"temperature": 0}, "pinned": 1})
    text = exchange.to_json(store, [key])
    [copy] = exchange.import_text(store, text)
    again = json.loads(exchange.to_json(store, [copy]))["conversations"][0]
    first = json.loads(text)["conversations"][0]
    strip = lambda one: [
        (m["role"], m["content"], m["status"], m["stats"], m["model"], m["attachments"]) for m in one["messages"]
    ]
    assert strip(first) == strip(again)
    assert [again[name] for name in ("title", "system_prompt", "sampling", "pinned")] == [
        "Über alles",
        "Be brief.",
        {"temperature": 0},
        True,
    ]
    assert [m["content"] for m in tree.path(store, conversations.get(store, copy)["leaf"])] == ["q", "one"]


def test_markdown_round_trip_of_the_shown_path(store):
    tricky = "```\n## User\n```\n\n## Assistant\nis a heading here"
    key, ids = add(store, "first\n\nline", tricky, "third", title="Notes")
    conversations.change(store, key, {"system_prompt": "One.\n\nTwo."})
    attachments.add(store, "new", "f.md", b"````\n## User\n````\n")
    attachments.send(store, "new", ids[2])
    [copy] = exchange.import_text(store, exchange.to_markdown(store, key))
    found = conversations.get(store, copy)
    path = tree.path(store, found["leaf"])
    assert (found["title"], found["system_prompt"]) == ("Notes", "One.\n\nTwo.")
    assert [m["role"] for m in path] == ["user", "assistant", "user"]
    assert path[1]["content"].endswith("## Assistant\nis a heading here")
    assert "third" in path[2]["content"] and "f.md" in path[2]["content"]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "complete JSON"),
        ("[1, 2]", "no export"),
        ('{"format": "edge-runtime-chat", "version": 9, "conversations": []}', "version"),
        ("just a text", "no conversation"),
        (EXPORT + ' [{"messages": 3}]}', "messages"),
        (
            EXPORT + ' [{"messages": []}, {"messages": [{"role": "system"}]}]}',
            "role",
        ),
        (
            EXPORT + ' [{"messages": [{"role": "user", "content": 5}]}]}',
            "content",
        ),
        (
            EXPORT + ' [{"messages": [{"id": 1, "parent": 2, "role": "user"}]}]}',
            "parent",
        ),
        (EXPORT + ' [{"messages": [{"id": 1, "parent": [1], "role": "user"}]}]}', "parent"),
        (EXPORT + ' [{"messages": [{"id": [1], "role": "user"}]}]}', "id is"),
        (EXPORT + ' [{"messages": [{"id": 1, "role": "user"}, {"id": 1, "role": "user"}]}]}', "no message before"),
        (EXPORT + ' [{"messages": [{"role": "user", "attachments": 5}]}]}', "attachments"),
        (EXPORT + ' [{"messages": [], "sampling": {"temperature": "hot"}}]}', "temperature"),
    ],
)
def test_files_that_are_no_export_change_nothing(store, text, reason):
    with pytest.raises(ImportFileError, match=reason):
        exchange.import_text(store, text)
    assert conversations.listed(store) == []


def test_a_leaf_that_is_none_is_left_out(store):
    [key] = exchange.import_text(store, EXPORT + ' [{"messages": [{"id": 1, "role": "user"}], "leaf": [1]}]}')
    assert len(tree.path(store, conversations.get(store, key)["leaf"])) == 1


def test_long_markdown_is_imported_in_one_pass():
    """Each heading once looked for the fences from the file's beginning: minutes for a year of chats."""
    turns = 3000
    text = "# Long\n\n" + "\n\n".join(f"## User\n\n```\n## User\n```\n\n## Assistant\n\n{i}" for i in range(turns))
    began = time.thread_time()
    found = exchange._headings(text)
    assert time.thread_time() - began < 1 and len(found) == 2 * turns


def message(id, role, content):
    return {"id": id, "role": role, "content": content}


def test_the_model_gets_attachments_first_and_no_reasoning():
    path = [
        message(1, "user", "why?"),
        message(2, "assistant", "<think>\nhm\n</think>\n\nBecause."),
        message(3, "user", "more"),
    ]
    texts = {1: [{"name": "a.txt", "text": "facts"}]}
    found = prompts.messages_for_model(path, texts, " Be brief. ", bundled_model=False)
    assert found == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": '<document name="a.txt">\nfacts\n</document>\n\nwhy?'},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "more"},
    ]
    assert prompts.without_reasoning("opened by the template</think>\nYes") == "Yes"
    assert prompts.without_reasoning("<think>never ended") == ""
    last = prompts.messages_for_model(path[:2], {}, "", bundled_model=False)[-1]
    assert last["content"].startswith("<think>"), "a reply that is continued stays as it is"


def test_the_bundled_model_is_asked_as_it_was_trained():
    attached = [{"name": "a.txt", "text": "Report.\n"}]
    assert prompts.user_content("Please summarise this", attached, True) == bundled.summarize_prompt("Report.")
    assert prompts.user_content("", attached, True) == bundled.summarize_prompt("Report.")
    assert prompts.user_content("Who wrote it?", attached, True) == bundled.question_prompt("Report.", "Who wrote it?")
    assert prompts.user_content("Hello", [], True) == "Hello"
