"""The chat's server end to end, over a model that says what it is told to: replies, stops, branches, bad requests."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

pytest.importorskip("starlette")

from edge_runtime.apps.chat.errors import DiskFullError
from tests.apps.chats import Listener, chatting

EXPORT = b'{"format": "edge-runtime-chat", "version": 1, "conversations":'


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with chatting(tmp_path_factory.mktemp("chat")) as found:
        yield found


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    with chatting(tmp_path_factory.mktemp("slow"), delay=0.02) as found:
        yield found


def test_a_message_makes_a_conversation_and_its_reply(client):
    sent, reply = client.ask("SAY:Hello there")
    assert (reply["content"], reply["status"], reply["model"]) == ("Hello there", "complete", "echo")
    assert reply["stats"]["completion_tokens"] == 11 and reply["stats"]["ttft"] > 0
    found = client("GET", f"conversations/{sent['conversation']}")
    assert found["title"] == "SAY:Hello there" and [m["role"] for m in found["messages"]] == ["user", "assistant"]


def test_what_is_streamed_is_what_is_stored(slow):
    listener = Listener(slow)
    sent, reply = slow.ask("SAY:" + "word " * 20)
    listener.wait(lambda name, data: name == "reply" and data["message"] == sent["reply"])
    pieces = [data for name, data in listener.events if name == "delta" and data["message"] == sent["reply"]]
    assert "".join(piece["text"] for piece in pieces) == reply["content"] and len(pieces) > 10
    assert [piece["piece"] for piece in pieces] == [0, *[piece["next"] for piece in pieces[:-1]]]
    ends = [piece["start"] + len(piece["text"]) for piece in pieces]
    assert [piece["start"] for piece in pieces] == [0, *ends[:-1]]
    assert any(name == "kv" and data["host"] > 0 and data["device"] == 0 for name, data in listener.events)


def test_stop_keeps_the_text_and_continue_goes_on(slow):
    text = "abcdefghij" * 10
    sent = slow.send(f"SAY:{text}")
    while len(slow.message(sent["conversation"], sent["reply"])["content"]) < 5:
        time.sleep(0.01)
    began = time.monotonic()
    slow("POST", f"messages/{sent['reply']}/stop", {})
    assert time.monotonic() - began < 2
    stopped = slow.message(sent["conversation"], sent["reply"])
    assert stopped["status"] == "stopped" and 5 <= len(stopped["content"]) < 100
    slow("POST", f"messages/{sent['reply']}/continue", {})
    done = slow.finished(sent["conversation"], sent["reply"])
    assert (done["content"], done["status"]) == (text, "complete")
    slow("POST", f"messages/{sent['reply']}/continue", {}, status=400)


def test_partial_replies_are_on_the_disk_ten_times_a_second(slow):
    sent = slow.send("SAY:" + "x" * 80)
    lengths = []
    for _ in range(12):
        time.sleep(0.1)
        row = slow.server.app.state.chat.store.row("SELECT content FROM messages WHERE id = ?", sent["reply"])
        lengths.append(len(row["content"]))
    assert len(set(lengths)) > 6, lengths
    slow.finished(sent["conversation"], sent["reply"])


def test_edit_regenerate_select_fork_delete(client):
    sent, _ = client.ask("SAY:one")
    conversation = sent["conversation"]
    edited = client("POST", f"messages/{sent['message']}/edit", {"text": "SAY:two"})
    assert client.finished(conversation, edited["reply"])["content"] == "two"
    again = client("POST", f"messages/{edited['reply']}/regenerate", {})
    reply = client.finished(conversation, again["reply"])
    assert reply["siblings"] == [edited["reply"], again["reply"]]
    client("POST", f"messages/{sent['message']}/select", {})
    shown = client("GET", f"conversations/{conversation}")["messages"]
    assert [m["content"] for m in shown] == ["SAY:one", "one"]
    assert shown[0]["siblings"] == [sent["message"], edited["message"]]
    twin = client("POST", f"messages/{sent['reply']}/fork", {})["conversation"]
    assert [m["content"] for m in client("GET", f"conversations/{twin}")["messages"]] == ["SAY:one", "one"]
    client("DELETE", f"messages/{sent['message']}")
    assert [m["content"] for m in client("GET", f"conversations/{conversation}")["messages"]] == ["SAY:two", "two"]
    client("DELETE", f"conversations/{conversation}")
    client("GET", f"conversations/{conversation}", status=404)
    assert len(client("GET", f"conversations/{twin}")["messages"]) == 2


def test_drafts_and_attachments_become_the_message(client):
    client("PUT", "drafts/new", {"text": "half"})
    assert client("GET", "drafts/new")["text"] == "half"
    file = client("POST", "attachments?draft=new&name=a.txt", raw=b"SAY:from the file")
    assert client("GET", f"attachments/{file['id']}")["text"] == "SAY:from the file"
    gone = client("POST", "attachments?draft=new&name=b.txt", raw=b"x")
    client("DELETE", f"attachments/{gone['id']}")
    sent = client.send("")
    assert client("GET", "drafts/new") == {"text": "", "updated": 0, "attachments": []}
    shown = client.message(sent["conversation"], sent["message"])
    assert [one["name"] for one in shown["attachments"]] == ["a.txt"]
    client.finished(sent["conversation"], sent["reply"])


def test_settings_of_a_conversation_reach_the_model(client):
    sent, _ = client.ask("SAY:abcdefghij")
    key = sent["conversation"]
    client("PATCH", f"conversations/{key}", {"sampling": {"max_tokens": 4, "temperature": 0}, "system_prompt": "s"})
    again = client("POST", f"messages/{sent['reply']}/regenerate", {})
    reply = client.finished(key, again["reply"])
    assert (reply["content"], reply["status"]) == ("abcd", "length")
    for sampling in ({"temperature": -1}, {"top_p": 0}, {"nonsense": 1}, {"max_tokens": "many"}, [1]):
        client("PATCH", f"conversations/{key}", {"sampling": sampling}, status=400)


def test_context_overflow_is_an_error_that_says_what_to_do(client):
    sent, reply = client.ask("x" * 6000)
    assert reply["status"] == "error" and "exceed the context of 4096 tokens" in reply["error"]
    assert "Shorten" in reply["error"]
    assert client.message(sent["conversation"], sent["message"])["content"] == "x" * 6000


def test_folders_presets_settings_search_export_import(client):
    folder = client("POST", "folders", {"name": " Work "})["folder"]
    sent, _ = client.ask("SAY:albatross")
    key = sent["conversation"]
    assert (
        client("PATCH", f"conversations/{key}", {"folder": folder, "pinned": True, "title": "Birds"})["pinned"] is True
    )
    assert client("GET", "search?q=albatr")["hits"]
    assert "albatross" in client("GET", f"export?conversation={key}&format=md")
    exported = client.http.get("/api/export").content
    count = len(client("GET", "start")["conversations"])
    assert len(client("POST", "import?name=x.json", raw=exported)["conversations"]) == count
    client("POST", "import?name=x.bin", raw=b"\xff\xfe\x00", status=422)
    client("DELETE", f"folders/{folder}")
    assert client("GET", f"conversations/{key}")["folder"] is None
    preset = client("POST", "presets", {"name": "Mine", "system_prompt": "p", "sampling": {"top_k": 5}})["preset"]
    client("PATCH", "settings", {"preset": preset, "theme": "dark"})
    new, _ = client.ask("SAY:x")
    assert client("GET", f"conversations/{new['conversation']}")["system_prompt"] == "p"
    client("DELETE", f"presets/{preset}")
    client("DELETE", "presets/1", status=404)
    client("PATCH", "settings", {"theme": "pink"}, status=400)


def test_models_are_listed_and_bad_ones_refused(client, tmp_path):
    assert [one["name"] for one in client("GET", "models")["models"]] == ["echo"]
    client("POST", "models/load", {"name": "none"}, status=400)
    client("POST", "models/add", {"path": str(tmp_path / "none.gguf")}, status=404)
    (tmp_path / "a.txt").write_text("x")
    assert ".gguf" in client("POST", "models/add", {"path": str(tmp_path / "a.txt")}, status=400)["error"]["message"]


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("POST", "messages", b"{", 400),
        ("POST", "messages", b"[]", 400),
        ("POST", "messages", b"{}", 400),
        ("POST", "messages", b'{"text": "x", "draft": "../../etc"}', 400),
        ("POST", "messages", b'{"text": 3, "draft": "new"}', 400),
        ("POST", "messages", b'{"text": "x", "draft": "new", "conversation": 99999}', 404),
        ("POST", "messages", b'{"text": "x", "draft": "new", "conversation": "1"}', 400),
        ("POST", "messages", b'{"text": "  ", "draft": "new"}', 400),
        ("POST", "messages/99999/edit", b'{"text": "x"}', 404),
        ("POST", "messages/99999/regenerate", b"{}", 404),
        ("GET", "conversations/99999", None, 404),
        ("GET", "nothing", None, 404),
        ("PATCH", "conversations/99999", b'{"title": "x"}', 404),
        ("POST", "folders", b'{"name": " "}', 400),
        ("GET", "export?format=exe", None, 400),
        ("PUT", "drafts/x", b'{"text": "x"}', 400),
        ("POST", "attachments?draft=new&name=x.txt", b"\0\1\2", 422),
        ("POST", "messages", b"[" * 100000, 400),
        ("POST", "messages", b'{"text": "x", "draft": "new", "folder": 99999}', 404),
        ("GET", f"conversations/{'9' * 30}", None, 404),
        ("POST", f"messages/{'9' * 30}/fork", b"{}", 404),
        ("PATCH", f"presets/{'9' * 30}", b'{"name": "x"}', 404),
        ("GET", f"export?conversation={'9' * 5000}", None, 404),
        ("GET", "export?conversation=%C2%B2", None, 404),
        ("PATCH", "settings", b'{"preset": 1e999}', 400),
        ("PATCH", "settings", b'{"preset": 1' + b"0" * 30 + b"}", 400),
        ("PATCH", "settings", b'{"sidebar": [1]}', 400),
        ("POST", "models/add", b'{"path": "~nobody-has-this-name/x.gguf"}', 400),
        ("POST", "models/add", b'{"path": "' + b"x" * 5000 + b'.gguf"}', 400),
        ("POST", "import?name=x", EXPORT + b'[{"messages": [{"role": "user", "stats": {"ttft": NaN}}]}]}', 422),
        ("POST", "import?name=x", EXPORT + b'[{"messages": [], "sampling": {"temperature": 1e999}}]}', 422),
    ],
)
def test_bad_requests_say_what_is_wrong(client, method, path, body, status):
    found = client(method, path, raw=body, status=status)
    assert found["error"]["message"]


def test_a_value_that_no_page_can_be_sent_does_not_shut_the_chat(client):
    made = client("POST", "presets", raw=b'{"name": "odd\\ud800", "sampling": {"stop": ["\\ud800"]}}')["preset"]
    imported = EXPORT + b'[{"messages": [{"role": "user", "content": "a\\ud800b"}], "title": "t\\udfff"}]}'
    [key] = client("POST", "import?name=x", raw=imported)["conversations"]
    assert client("GET", f"conversations/{key}")["messages"][0]["content"] == "a?b"
    assert [one["name"] for one in client("GET", "start")["presets"] if one["id"] == made] == ["odd?"]
    client("DELETE", f"presets/{made}")
    client("DELETE", f"conversations/{key}")
    assert client("GET", "search?q=a%00b")["hits"] == []


def test_a_large_body_is_refused(client):
    client("POST", "messages", raw=b'{"text": "' + b"x" * (17 << 20) + b'"}', status=400)


def test_lone_surrogates_and_zero_bytes_survive(client):
    sent = client("POST", "messages", raw=b'{"text": "SAY:a\\ud800b", "draft": "new"}')
    assert client.message(sent["conversation"], sent["message"])["content"] == "SAY:a?b"
    client.finished(sent["conversation"], sent["reply"])


def test_a_full_disk_keeps_the_reply_until_there_is_room(slow, monkeypatch):
    chat, listener = slow.server.app.state.chat, Listener(slow)
    full = threading.Event()
    from edge_runtime.apps.chat import tree

    save = tree.save

    def saving(*args, **options):
        if full.is_set():
            raise DiskFullError("chat.sqlite3")
        return save(*args, **options)

    monkeypatch.setattr(tree, "save", saving)
    sent = slow.send("SAY:" + "y" * 30)
    full.set()
    trouble = listener.wait(lambda name, data: name == "trouble" and data["message"])
    assert "disk is full" in trouble["message"]
    listener.wait(lambda name, data: name == "delta" and data["next"] >= 30)
    time.sleep(0.3)
    assert slow.message(sent["conversation"], sent["reply"])["content"] == "y" * 30, "the page still sees it"
    full.clear()
    assert slow.finished(sent["conversation"], sent["reply"])["content"] == "y" * 30
    listener.wait(lambda name, data: name == "trouble" and data["message"] == "")
    row = chat.store.row("SELECT content, status FROM messages WHERE id = ?", sent["reply"])
    assert row == {"content": "y" * 30, "status": "complete"}


def test_deltas_start_where_javascript_counts(slow):
    listener = Listener(slow)
    sent, _ = slow.ask("SAY:a🎉b")
    listener.wait(lambda name, data: name == "reply" and data["message"] == sent["reply"])
    starts = [(data["text"], data["start"]) for name, data in listener.events if name == "delta"]
    assert starts == [("a", 0), ("🎉", 1), ("b", 3)]


def test_a_slow_save_does_not_undo_the_last_one(slow, monkeypatch):
    from edge_runtime.apps.chat import tree

    save, begun = tree.save, threading.Event()

    def saving(store, message, content, **values):
        if values["status"] == "streaming":
            begun.set()
            time.sleep(0.5)  # the reply ends meanwhile
        save(store, message, content, **values)

    monkeypatch.setattr(tree, "save", saving)
    sent, reply = slow.ask("SAY:twelve chars")
    assert begun.is_set(), "the reply was too short to be saved on its way"
    time.sleep(0.6)
    stored = slow.server.app.state.chat.store.row("SELECT content, status FROM messages WHERE id = ?", sent["reply"])
    assert stored == {"content": "twelve chars", "status": "complete"} and reply["status"] == "complete"


def test_many_conversations_at_once_do_not_mix(client):
    sent = [client.send(f"SAY:number {i} of many") for i in range(16)]
    for i, one in enumerate(sent):
        assert client.finished(one["conversation"], one["reply"])["content"] == f"number {i} of many"


def test_the_end_stops_replies_and_keeps_their_text(tmp_path):
    with chatting(tmp_path, delay=0.02) as client:
        sent = client.send("SAY:" + "z" * 300)
        while len(client.message(sent["conversation"], sent["reply"])["content"]) < 3:
            time.sleep(0.01)
    with chatting(tmp_path) as client:
        reply = client.message(sent["conversation"], sent["reply"])
        assert reply["status"] == "stopped" and 3 <= len(reply["content"]) < 300
        with pytest.raises(httpx.HTTPStatusError):
            client.http.get("/api/conversations/0").raise_for_status()
