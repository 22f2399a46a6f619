"""Conversations as trees: branches, selection, deletion, forks, checked against a plain model of a tree."""

from __future__ import annotations

import random

import pytest

from edge_runtime.apps.chat import attachments, conversations, drafts, tree
from edge_runtime.apps.chat.errors import NotFoundError
from edge_runtime.apps.chat.store import Store


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


def contents(store, leaf):
    return [message["content"] for message in tree.path(store, leaf)]


def test_edits_and_regenerations_are_siblings_and_the_last_is_shown(store):
    key = conversations.create(store, "t")
    a = tree.add(store, key, None, "user", "a")
    b = tree.add(store, key, a, "assistant", "b")
    c = tree.add(store, key, a, "assistant", "c")
    shown = tree.shown(store, conversations.get(store, key)["leaf"])
    assert [one["content"] for one in shown] == ["a", "c"]
    assert shown[1]["siblings"] == [b, c] and shown[0]["siblings"] == [a]
    assert tree.select(store, b) == b
    assert contents(store, conversations.get(store, key)["leaf"]) == ["a", "b"]


def test_selecting_shows_the_branch_written_last(store):
    key = conversations.create(store, "t")
    a = tree.add(store, key, None, "user", "a")
    b = tree.add(store, key, a, "assistant", "b")
    c = tree.add(store, key, b, "user", "c")
    other = tree.add(store, key, None, "user", "a2")
    assert conversations.get(store, key)["leaf"] == other
    assert tree.select(store, a) == c
    assert contents(store, c) == ["a", "b", "c"]


def test_deleting_a_branch_shows_its_sibling_then_its_parent(store):
    key = conversations.create(store, "t")
    a = tree.add(store, key, None, "user", "a")
    b = tree.add(store, key, a, "assistant", "b")
    c = tree.add(store, key, a, "assistant", "c")
    tree.add(store, key, c, "user", "d")
    assert tree.delete_branch(store, c) == b
    assert tree.delete_branch(store, b) == a
    assert tree.delete_branch(store, a) is None
    assert store.row("SELECT count(*) AS n FROM messages")["n"] == 0
    with pytest.raises(NotFoundError):
        tree.delete_branch(store, a)


def test_a_fork_copies_the_path_and_its_attachments(store):
    key = conversations.create(store, "t", system_prompt="s", sampling={"temperature": 0})
    attachments.add(store, "new", "f.txt", b"text")
    a = tree.add(store, key, None, "user", "a")
    attachments.send(store, "new", a)
    b = tree.add(store, key, a, "assistant", "b")
    tree.add(store, key, b, "user", "c")
    twin = conversations.fork(store, b)
    found = conversations.get(store, twin)
    assert (found["system_prompt"], found["sampling"]) == ("s", {"temperature": 0})
    shown = tree.shown(store, found["leaf"])
    assert [one["content"] for one in shown] == ["a", "b"]
    assert [one["name"] for one in shown[0]["attachments"]] == ["f.txt"]
    conversations.delete(store, key)
    assert contents(store, found["leaf"]) == ["a", "b"]


def test_a_parent_of_another_conversation_is_refused(store):
    one, two = conversations.create(store, "1"), conversations.create(store, "2")
    a = tree.add(store, one, None, "user", "a")
    with pytest.raises(NotFoundError):
        tree.add(store, two, a, "user", "b")


def test_deep_conversations(store):
    key, parent = conversations.create(store, "t"), None
    with store.transaction():
        for i in range(3000):
            parent = tree.add(store, key, parent, "user" if i % 2 == 0 else "assistant", str(i))
    assert contents(store, parent) == [str(i) for i in range(3000)]
    first = tree.path(store, parent)[0]["id"]
    assert tree.last_leaf(store, first) == parent
    tree.delete_branch(store, tree.path(store, parent)[1]["id"])
    assert contents(store, conversations.get(store, key)["leaf"]) == ["0"]
    with store.transaction():
        for _ in range(3000):
            parent = tree.add(store, key, None if parent is None else first, "user", "x")
            first = parent
    conversations.delete(store, key)
    assert store.row("SELECT count(*) AS n FROM messages")["n"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_agree_with_a_plain_one(store, seed):
    print("seed", seed)
    rng = random.Random(seed)
    key = conversations.create(store, "t")
    parents: dict[int, int | None] = {}

    def path(leaf):
        out = []
        while leaf is not None:
            out.append(leaf)
            leaf = parents[leaf]
        return out[::-1]

    def below(message):
        found = {message}
        for other in sorted(parents):
            if parents[other] in found:
                found.add(other)
        return found

    for _ in range(120):
        act = rng.random()
        if act < 0.6 or not parents:
            parent = rng.choice([None, *parents])
            new = tree.add(store, key, parent, "user", "x")
            parents[new] = parent
            leaf = new
        elif act < 0.8:
            chosen = rng.choice(list(parents))
            leaf = max(below(chosen))
            assert tree.select(store, chosen) == leaf
        else:
            chosen = rng.choice(list(parents))
            leaf = conversations.get(store, key)["leaf"]
            gone, up = below(chosen), parents[chosen]
            for one in gone:
                del parents[one]
            if leaf in gone:
                siblings = [one for one in parents if parents[one] == up]
                leaf = max(below(max(siblings))) if siblings else up
            assert tree.delete_branch(store, chosen) == leaf
        assert conversations.get(store, key)["leaf"] == leaf
        assert [one["id"] for one in tree.path(store, leaf)] == path(leaf)
        for one in tree.shown(store, leaf):
            assert one["siblings"] == sorted(m for m in parents if parents[m] == one["parent"])


def test_drafts_are_kept_per_place_and_go_with_what_they_belong_to(store):
    key = conversations.create(store, "t")
    drafts.put(store, "new", "half a thought")
    drafts.put(store, f"c:{key}", "another")
    attachments.add(store, f"c:{key}", "f.txt", b"text")
    assert drafts.get(store, "new")["text"] == "half a thought"
    assert [one["name"] for one in drafts.get(store, f"c:{key}")["attachments"]] == ["f.txt"]
    assert sorted(drafts.keys(store)) == [f"c:{key}", "new"]
    conversations.delete(store, key)
    assert drafts.keys(store) == ["new"]
    drafts.put(store, "new", "")
    assert drafts.get(store, "new")["text"] == ""
