"""Sessions: what they keep, share, save and load."""
from __future__ import annotations

import json
import os
import random
import struct
import zlib

import pytest

from edge_runtime import SamplingParams
from edge_runtime.errors import ContextLengthError, InvalidRequestError, NumericalError, SessionFileError
from tests.edge_runtime.llms import fake_llm, fake_of, settled
from tests.fake_device import BOS, greedy

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture
def llm():
    with fake_llm() as llm:
        yield llm


def continuation(text: str, count: int = 12) -> list[int]:
    return greedy([BOS, *text.encode()], count)


def test_running_text_is_computed_once(llm):
    session = llm.session()
    session.append("once upon ")
    session.append("a time ")
    reply = session.generate("there was ", GREEDY)
    assert list(reply.token_ids) == continuation("once upon a time there was ")
    assert session.text == "once upon a time there was " + reply.text and len(session) == 28 + 12
    more = session.generate(" and then", GREEDY)
    assert list(more.token_ids) == greedy([*session.token_ids[:40], *b" and then"], 12)
    assert sum(map(sum, fake_of(llm).sizes)) == len(session) - 1  # no token twice, the last not yet
    streamed = session.generate(params=GREEDY, stream=True)
    assert "".join(c.text for c in streamed) == llm.generate(session.token_ids[:-12], GREEDY).text


def test_chat_keeps_messages_and_kv(llm):
    session = llm.session()
    messages = [{"role": "system", "content": "be brief " * 20}]
    for turn in range(4):
        question = {"role": "user", "content": f"question {turn}"}
        reply = session.chat([*messages, question] if turn == 0 else question, GREEDY)
        messages.append(question)
        assert reply.text == llm.chat(messages, GREEDY).text
        messages.append({"role": "assistant", "content": reply.text})
        assert session.messages == messages
        assert turn == 0 or reply.stats.cached_tokens >= reply.stats.prompt_tokens - 60
    with pytest.raises(InvalidRequestError, match="messages"):
        session.chat([])
    running = llm.session()
    running.append("text")
    with pytest.raises(InvalidRequestError, match="running text"):
        running.chat("hi")


def test_a_chat_that_fails_or_is_cancelled_leaves_the_session_as_it_was():
    with fake_llm(poison=lambda history: history[-1] == ord("!")) as llm:
        session = llm.session()
        session.chat("one", GREEDY)
        before = [dict(m) for m in session.messages]
        with pytest.raises(NumericalError):
            session.generate("bad!", GREEDY)
        stream = session.chat("two", max_tokens=3000, stream=True)
        next(stream)
        with pytest.raises(InvalidRequestError, match="idle"):
            session.chat("three")
        with pytest.raises(InvalidRequestError, match="idle"):
            session.fork()
        stream.close()
        assert session.messages == before or not session.messages
        fresh = llm.session()
        fresh.chat("one", GREEDY)
        stream = fresh.chat("two", max_tokens=3000, stream=True)
        next(stream)
        stream.cancel()
        assert list(stream)[-1].finish_reason == "cancelled"
        assert fresh.messages == before
        assert fresh.chat("two", GREEDY).text == llm.chat([*before, {"role": "user", "content": "two"}], GREEDY).text


def test_a_first_chat_that_was_cancelled_is_no_running_text(llm, tmp_path):
    for cancel in (lambda stream: stream.close(), lambda stream: (stream.cancel(), list(stream))):
        session = llm.session()
        stream = session.chat("one", max_tokens=3000, stream=True)
        next(stream)
        cancel(stream)
        session.fork().chat("two", GREEDY)
        session.save(tmp_path / "s")
        assert llm.load_session(tmp_path / "s").chat("two", GREEDY).text == llm.chat("two", GREEDY).text
        assert session.chat("two", GREEDY).text == llm.chat("two", GREEDY).text and len(session.messages) == 2
    session.truncate(3)
    session.save(tmp_path / "s")
    for text in (session, session.fork(), llm.load_session(tmp_path / "s")):
        with pytest.raises(InvalidRequestError, match="running text"):
            text.chat("hi")
    session.truncate(0)
    session.chat("two", GREEDY)


def test_a_message_that_is_continued_stays_one(llm):
    begun = [{"role": "user", "content": "tell"}, {"role": "assistant", "content": "Once"}]
    go_on = {"continue_final_message": True}
    session = llm.session()
    reply = session.chat(begun, GREEDY, template=go_on)
    assert session.messages == [begun[0], {"role": "assistant", "content": "Once" + reply.text}]
    parts = llm.session()
    again = parts.chat([begun[0], {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}], GREEDY,
                       template=go_on)
    assert again.text == reply.text and parts.messages[1]["content"][1] == {"type": "text", "text": reply.text}
    assert session.chat("more", GREEDY).text == llm.chat([*session.messages[:2], {"role": "user", "content": "more"}],
                                                         GREEDY).text


def test_forks_go_their_own_ways(llm):
    trunk = llm.session()
    trunk.append("the common beginning " * 10)
    branches = [trunk.fork() for _ in range(5)]
    for i, branch in enumerate(branches):
        reply = branch.generate(f"branch {i}", GREEDY)
        assert list(reply.token_ids) == continuation("the common beginning " * 10 + f"branch {i}")
        assert reply.stats.cached_tokens >= 200
    twice = branches[0].fork()
    assert twice.generate("x", GREEDY).text == branches[0].generate("x", GREEDY).text
    assert list(trunk.generate("", GREEDY).token_ids) == continuation("the common beginning " * 10)
    for session in (trunk, twice, *branches):
        session.close()
    settled(llm)


def test_truncate(llm):
    session = llm.session()
    session.generate("hello world", temperature=0, max_tokens=100)
    session.truncate(6)
    assert session.text == "hello"
    assert list(session.generate(" there", GREEDY).token_ids) == continuation("hello there")
    for bad in (-1, 1000, 1.5, True):
        with pytest.raises(InvalidRequestError, match="length"):
            session.truncate(bad)


def test_save_and_load(llm, tmp_path):
    session = llm.session()
    session.chat("a question " * 30, GREEDY)
    path = tmp_path / "talk.kv"
    session.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["talk.kv"]
    expected = session.fork().chat("next", GREEDY)
    with fake_llm() as other:
        loaded = other.load_session(path)
        assert loaded.messages == session.messages and loaded.token_ids == session.token_ids
        reply = loaded.chat("next", GREEDY)
        assert reply.text == expected.text and reply.stats.cached_tokens >= 350
        loaded.save(path)
        assert llm.load_session(path).messages == loaded.messages
    empty = llm.session()
    empty.save(path)
    assert llm.load_session(path).token_ids == []


def test_saving_while_others_run(llm, tmp_path):
    session = llm.session()
    session.append("some text " * 50)
    stream = llm.stream("other", temperature=0, max_tokens=2000)
    next(stream)
    session.save(tmp_path / "s")
    stream.close()
    loaded = llm.load_session(tmp_path / "s")
    assert list(loaded.generate("", GREEDY).token_ids) == continuation("some text " * 50)


def test_files_of_other_models_and_layouts(llm, tmp_path):
    path = tmp_path / "s"
    session = llm.session()
    session.append("hello")
    session.save(path)
    with fake_llm(fingerprint="another") as other, pytest.raises(SessionFileError, match="another model"):
        other.load_session(path)
    with fake_llm() as other:
        fake = fake_of(other)
        fake.kv_layout = type(fake.kv_layout)(2, 2, 16, "fp16")
        with pytest.raises(SessionFileError, match="kv='int8'"):
            other.load_session(path)
    with pytest.raises(SessionFileError, match="cannot be opened"):
        llm.load_session(tmp_path / "none")


def test_corrupt_files_are_refused(llm, tmp_path):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = tmp_path / "s"
    session = llm.session()
    session.append("hello " * 40)
    session.save(path)
    good = path.read_bytes()
    cases = [b"", b"EDGEKV1\n", good[:-1], good + b"x", good[:100], b"x" + good[1:],
             good[:8] + struct.pack("<I", 0xFFFFFFFF) + good[12:], good[:8] + struct.pack("<I", 5) + good[12:]]
    for _ in range(150):
        broken = bytearray(good)
        at = rng.choice([rng.randrange(len(good)), rng.randrange(400)])
        broken[at] ^= 1 << rng.randrange(8)
        cases.append(bytes(broken))
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(SessionFileError):
            llm.load_session(path)
    settled_pages = llm.engine.call(lambda: llm.engine.cache.pool.used)
    path.write_bytes(good)
    assert llm.load_session(path).token_ids == session.token_ids
    assert llm.engine.call(lambda: llm.engine.cache.pool.used) == settled_pages + 4


@pytest.mark.parametrize("messages", [5, True, "abc", {"a": 1}, [1], [{"role": "x", "content": "a"}],
                                      [{"role": "user", "content": 5}]])
def test_files_with_other_messages_than_a_chats(llm, tmp_path, messages):
    path = tmp_path / "s"
    llm.session().save(path)
    raw = path.read_bytes()
    size = struct.unpack("<I", raw[8:12])[0]
    header = json.dumps({**json.loads(raw[12:12 + size]), "messages": messages}).encode()
    path.write_bytes(raw[:8] + struct.pack("<I", len(header)) + header + struct.pack("<I", zlib.crc32(header))
                     + raw[16 + size:])
    with pytest.raises(SessionFileError, match="broken header"):
        llm.load_session(path)


def test_paths_that_hold_no_session(llm, tmp_path):
    with pytest.raises(SessionFileError, match="folder"):
        llm.load_session(tmp_path)
    (tmp_path / "newer").write_bytes(b"EDGEKV2\n" + bytes(100))
    with pytest.raises(SessionFileError, match="another version"):
        llm.load_session(tmp_path / "newer")
    with pytest.raises(SessionFileError, match="file name"):
        llm.load_session("a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(SessionFileError, match="pipe"):
            llm.load_session(tmp_path / "pipe")


def test_a_failed_save_leaves_the_old_file(llm, tmp_path, monkeypatch):
    path = tmp_path / "s"
    session = llm.session()
    session.append("hello")
    session.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    session.append("more")
    with pytest.raises(OSError, match="disk full"):
        session.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_idle_sessions_make_way_and_are_computed_again():
    with fake_llm(pages=12) as llm:
        sessions = [llm.session() for _ in range(6)]
        for i, session in enumerate(sessions):
            session.append(f"session {i} " * 25)
        for i, session in enumerate(sessions):
            assert list(session.generate("", GREEDY).token_ids) == continuation(f"session {i} " * 25)


def test_sessions_outlive_the_engines_thread():
    def fail(step: int) -> None:
        if step == 2:
            raise SystemExit

    with fake_llm(fail=fail) as llm:
        session = llm.session()
        session.append("hello ")
        session.append("there ")
        with pytest.raises(Exception, match="thread"):
            session.append("world")
        assert session.text == "hello there "
        assert list(session.generate("", GREEDY).token_ids) == continuation("hello there ")


def test_bad_input(llm):
    session = llm.session()
    for bad in ([], [999], 5, [1.5]):
        with pytest.raises((InvalidRequestError, ValueError)):
            session.append(bad)
    with pytest.raises(ContextLengthError):
        session.append("x" * 5000)
    with pytest.raises(InvalidRequestError):
        session.generate("x", temperature=-1)
    assert session.token_ids == []
    assert session.generate("hello", max_tokens=0).finish_reason == "length"
    assert session.text == "hello"
    assert list(session.generate("", GREEDY).token_ids) == continuation("hello")
