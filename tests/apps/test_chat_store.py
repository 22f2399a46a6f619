"""The chat's database: migrations, ownership, kills, full disks, foreign files."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest

from edge_runtime.apps.chat import conversations, tree
from edge_runtime.apps.chat.errors import DamagedDataError, DataInUseError, DiskFullError
from edge_runtime.apps.chat.store import DATABASE_NAME, Store


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "data")
    yield opened
    opened.close()


def test_is_wal_private_and_migrated_once(store):
    assert store.row("PRAGMA journal_mode")["journal_mode"] == "wal"
    assert store.row("PRAGMA user_version")["user_version"] == 1
    if os.name != "nt":
        assert store.path.stat().st_mode & 0o077 == 0
        assert store.folder.stat().st_mode & 0o077 == 0
    folder = store.folder
    key = conversations.create(store, "kept")
    store.close()
    again = Store(folder)
    assert conversations.get(again, key)["title"] == "kept"
    again.close()


def test_a_second_process_is_told_who_owns_the_folder(store):
    store.lock.announce({"url": "http://127.0.0.1:1", "secret": "s"})
    code = (
        "import sys; from pathlib import Path; from edge_runtime.apps.chat.store import Store; "
        "from edge_runtime.apps.chat.errors import DataInUseError\n"
        "try: Store(Path(sys.argv[1]))\nexcept DataInUseError as error: print(error, error.owner['secret'])"
    )
    said = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True, check=True)
    assert f"(process {os.getpid()})" in said.stdout and "--data" in said.stdout and said.stdout.strip().endswith(" s")
    conversations.create(store, "the owner goes on")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_kill_drops_the_lock_and_keeps_what_was_committed(tmp_path):
    code = textwrap.dedent("""
        import sys, os
        from pathlib import Path
        from edge_runtime.apps.chat import conversations, tree
        from edge_runtime.apps.chat.store import Store
        store = Store(Path(sys.argv[1]))
        key = conversations.create(store, "t")
        root = tree.add(store, key, None, "user", "question")
        reply = tree.add(store, key, root, "assistant", "", status="streaming")
        n = 0
        while True:
            n += 1
            tree.save(store, reply, "x" * n)
            print(n, flush=True)
    """)
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(50):
        line = child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    rest = child.stdout.read()
    child.wait()
    complete = [one for one in rest.splitlines() if one]
    committed = int(complete[-2]) if len(complete) > 1 else int(line)
    store = Store(tmp_path)
    reply = store.row("SELECT * FROM messages WHERE role = 'assistant'")
    assert reply["status"] == "interrupted"
    assert len(reply["content"]) >= committed and set(reply["content"]) == {"x"}
    store.close()


def test_a_transaction_is_all_or_nothing(store):
    with pytest.raises(RuntimeError), store.transaction():
        conversations.create(store, "never")
        raise RuntimeError
    assert conversations.listed(store) == []


def test_a_full_disk_is_said_and_loses_nothing(store):
    key = conversations.create(store, "t")
    message = tree.add(store, key, None, "user", "kept")
    pages = store.row("PRAGMA page_count")["page_count"]
    store.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFullError, match="Free some space"):
        tree.add(store, key, message, "assistant", "y" * 1_000_000)
    store.rows("PRAGMA max_page_count = 1073741823")
    assert [one["content"] for one in tree.path(store, message)] == ["kept"]
    tree.add(store, key, message, "assistant", "y" * 1_000_000)


def test_a_lock_of_another_program_is_said(store, monkeypatch):
    store.rows("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DataInUseError, match="another program has locked"):
        conversations.create(store, "t")
    other.execute("ROLLBACK")
    other.close()
    conversations.create(store, "t")


def test_foreign_and_damaged_and_newer_databases_are_refused(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    connection = sqlite3.connect(foreign / DATABASE_NAME)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    with pytest.raises(DamagedDataError, match="another program"):
        Store(foreign)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / DATABASE_NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(DamagedDataError, match="damaged"):
        Store(damaged)
    Store(tmp_path / "newer").close()
    connection = sqlite3.connect(tmp_path / "newer" / DATABASE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DamagedDataError, match="newer version"):
        Store(tmp_path / "newer")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_folder_without_permission_is_said(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:
        for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
            folder.chmod(0o755)
    code = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from edge_runtime.apps.chat.errors import ChatDataError
        from edge_runtime.apps.chat.store import Store

        if os.geteuid() == 0:  # root may write anywhere
            os.setuid(65534)
        try:
            Store(Path(sys.argv[1]))
        except (ChatDataError, PermissionError) as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(closed)], capture_output=True, text=True, check=True)
    assert str(closed) in done.stdout and "ermission" in done.stdout and not list(closed.iterdir()), done


def test_many_threads_write_at_once(store):
    key = conversations.create(store, "t")

    def write(number: int) -> None:
        for i in range(20):
            tree.add(store, key, None, "user", f"{number}-{i}")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.row("SELECT count(*) AS n FROM messages")["n"] == 160


def test_the_owners_file_is_for_the_owner_alone(store):
    store.lock.announce({"secret": "s"})
    path = store.folder / "owner.json"
    assert json.loads(path.read_text())["pid"] == os.getpid()
    if os.name != "nt":
        assert path.stat().st_mode & 0o077 == 0
