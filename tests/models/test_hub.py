"""Models by name, against a server that speaks the hub's protocol."""
from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.errors import ChecksumError, DiskSpaceError, HubError, InvalidRequestError, NotPulledError
from edge_runtime.models import bundled, hub, hub_download
from tests.hub_server import HubServer, hub_server

REPO = "org/tiny-GGUF"
MIB = 1 << 20
CONTENT = random.Random(3).randbytes(3 * MIB + 17)


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(hub_download, "PAUSE", 0.001)
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add(REPO, {"README.md": b"# tiny", "tiny-Q4_0.gguf": CONTENT, "tiny-Q8_0.gguf": b"eight" * 100,
                           "mmproj-tiny-f16.gguf": b"no model"})
        yield running


def cache() -> Path:
    return Path(os.environ["HF_HOME"]) / "hub"


def leftovers() -> list[Path]:
    return list(cache().rglob("*.incomplete"))


def test_pull_takes_the_preferred_file_whole_and_says_what_it_did(server):
    seen: list[tuple[int, int]] = []
    got = hub.pull(REPO, progress=lambda done, total: seen.append((done, total)))
    assert got.path.read_bytes() == CONTENT and got.file == "tiny-Q4_0.gguf" and got.name == f"{REPO}:Q4_0"
    assert (got.fetched, got.resumed, got.nbytes) == (len(CONTENT), 0, len(CONTENT))
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert not leftovers()
    # The layout that other tools of the hub read.
    assert got.path.parent == cache() / "models--org--tiny-GGUF" / "snapshots" / got.commit
    assert got.path.resolve().name == hashlib.sha256(CONTENT).hexdigest()
    from huggingface_hub import hf_hub_download
    found = hf_hub_download(REPO, "tiny-Q4_0.gguf", cache_dir=cache(), local_files_only=True)
    assert Path(found) == got.path


def test_what_is_here_is_not_fetched_again_but_checked(server):
    first = hub.pull(REPO)
    sent = server.content_sent()
    again = hub.pull(f"hf.co/{REPO}:q4_0")
    assert again.path == first.path and again.fetched == 0 and server.content_sent() == sent
    damaged = bytearray(CONTENT)
    damaged[5] ^= 1
    first.path.write_bytes(damaged)
    lines: list[str] = []
    mended = hub.pull(REPO, say=lines.append)
    assert mended.path.read_bytes() == CONTENT and any("downloading it again" in line for line in lines)


def test_a_file_of_another_tool_is_taken_over(server):
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "tiny-Q8_0.gguf", cache_dir=cache(), endpoint=server.url)
    assert [model.name for model in hub.installed()] == [f"{REPO}:Q8_0"]
    assert hub.pull(f"{REPO}:Q8_0").fetched == 0


def test_a_file_kept_in_git_itself_is_checked_by_its_git_hash(server):
    server.add("org/small", {"small.gguf": b"in git"}, lfs=False)
    assert hub.pull("org/small").path.read_bytes() == b"in git"
    server.add("org/other", {"other.gguf": b"in git too"}, lfs=False)
    server.corrupt = True
    with pytest.raises(ChecksumError, match="git hash"):
        hub.pull("org/other")


@pytest.mark.parametrize("wanted, file", [
    ("", "a-Q4_K_M.gguf"), (":Q8_0", "a-q8_0.gguf"), (":q8_0", "a-q8_0.gguf"), (":fp16", "a.fp16.gguf"),
    (":IQ4_XS", "deep/a-IQ4_XS.gguf"), (":a-q8_0.gguf", "a-q8_0.gguf"), (":deep/a-IQ4_XS.gguf", "deep/a-IQ4_XS.gguf"),
    (":a-IQ4_XS.gguf", "deep/a-IQ4_XS.gguf")])
def test_the_file_is_chosen_by_quantization_or_name(server, wanted, file):
    names = ("a-Q4_K_M.gguf", "a-q8_0.gguf", "a.fp16.gguf", "deep/a-IQ4_XS.gguf", "a-Q2_K.gguf")
    server.add("org/many", {name: name.encode() for name in names})
    got = hub.pull("org/many" + wanted)
    assert got.file == file and got.path.read_bytes() == file.encode()
    assert hub.path_of("org/many" + wanted) == hub.path_of(got.name) == got.path


def test_unclear_names_list_the_choices(server):
    server.add("org/two", {"a-Q4_0.gguf": b"a", "b-Q4_0.gguf": b"b", "a-Q8_0.gguf": b"c"})
    for name in ("org/two", "org/two:Q4_0"):
        with pytest.raises(InvalidRequestError, match=r"org/two:a-Q4_0.gguf, org/two:b-Q4_0.gguf"):
            hub.pull(name)
    with pytest.raises(InvalidRequestError, match=r"org/two:a-Q4_0.gguf, org/two:Q8_0, org/two:b-Q4_0.gguf"):
        hub.pull("org/two:Q5_K_M")
    with pytest.raises(InvalidRequestError, match="one of what"):
        hub.pull("org/two:c.gguf")
    server.add("org/none", {"model.safetensors": b"x"})
    with pytest.raises(HubError, match="no GGUF model"):
        hub.pull("org/none")
    assert hub.is_name("https://huggingface.co/org/two:Q8_0") and not hub.is_name("two.gguf")
    for bad in ("", "a b/c", "../x", "org/repo:", "org/../repo", "/etc/passwd", "org/repo:/etc/passwd",
                "org/repo@/etc/passwd", "org/repo@a b"):
        with pytest.raises(InvalidRequestError, match="org/repo"):
            hub.pull(bad)
    for bad in ("../../up", "/etc/passwd"):
        with pytest.raises(InvalidRequestError, match="@revision"):
            hub.pull("org/two", revision=bad)
    assert server.content_sent() == 0


def test_models_in_parts_are_refused_with_a_way_out(server):
    parts = {f"Q4_0/big-Q4_0-0000{i}-of-00003.gguf": b"part" for i in (1, 2, 3)}
    server.add("org/big", parts)
    with pytest.raises(HubError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        hub.pull("org/big")
    server.add("org/big", {**parts, "big-Q5_0.gguf": b"whole"})
    assert hub.pull("org/big").file == "big-Q5_0.gguf"
    with pytest.raises(HubError, match="In one file there is: org/big:Q5_0"):
        hub.pull("org/big:Q4_0")


def test_a_server_that_names_files_outside_the_folder_is_not_followed(server):
    server.add("org/evil", {"../../../evil-Q4_0.gguf": b"x", "/tmp/evil-Q8_0.gguf": b"x"})
    with pytest.raises(HubError, match="no GGUF model"):
        hub.pull("org/evil")


def test_revisions_are_pinned(server):
    old = server.add("org/moving", {"m-Q4_0.gguf": b"old"})
    server.repositories["org/moving"].refs["v1"] = old
    first = hub.pull("org/moving")
    new = server.add("org/moving", {"m-Q4_0.gguf": b"new"})
    assert hub.path_of("org/moving") == first.path
    assert hub.pull("org/moving").commit == new
    assert hub.path_of("org/moving").read_bytes() == hub.path_of("org/moving:Q4_0@main").read_bytes() == b"new"
    assert hub.path_of(f"org/moving@{old[:12]}").read_bytes() == b"old"
    tagged = hub.pull("org/moving", revision="v1")
    assert tagged.path.read_bytes() == b"old" and tagged.name == "org/moving:Q4_0@v1" and tagged.fetched == 0
    assert hub.path_of(tagged.name) == tagged.path
    assert hub.pull(f"org/moving@{new}").commit == new
    assert [model.name for model in hub.installed("org/moving")] == ["org/moving:Q4_0", f"org/moving:Q4_0@{old[:12]}"]
    assert all(hub.path_of(model.name) == model.path for model in hub.installed())
    with pytest.raises(HubError, match="no such revision"):
        hub.pull("org/moving@v9")
    with pytest.raises(NotPulledError):
        hub.path_of("org/moving@v9")


def test_private_gated_and_missing_repositories(server, monkeypatch):
    server.add("org/private", {"p-Q4_0.gguf": b"secret"}, token="hf_right")
    with pytest.raises(HubError, match="HF_TOKEN"):
        hub.pull("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="HF_TOKEN"):
        hub.pull("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server.requests.clear()
    assert hub.pull("org/private").path.read_bytes() == b"secret"
    # The token goes to the hub alone, not to the host that it redirects to.
    assert [request.authorization for request in server.requests] == ["Bearer hf_right", "Bearer hf_right", None]
    server.add("org/gated", {"g-Q4_0.gguf": b"x"}, gated=True)
    with pytest.raises(HubError, match="terms"):
        hub.pull("org/gated")
    with pytest.raises(HubError, match="no such repository"):
        hub.pull("org/missing")


def test_offline_uses_what_is_here(server, monkeypatch):
    with pytest.raises(NotPulledError, match="offline"):
        hub.pull(REPO, offline=True)
    pulled = hub.pull(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.pull(REPO, offline=True).path == pulled.path
    with pytest.raises(HubError, match=r"cannot be reached.*--offline"):
        hub.pull(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.pull(f"{REPO}:Q4_0").path == pulled.path
    with pytest.raises(NotPulledError, match=f"of {REPO} there is|offline"):
        hub.pull(f"{REPO}:Q8_0")


def test_a_wrong_hash_is_an_error_and_nothing_is_kept(server):
    server.corrupt = True
    with pytest.raises(ChecksumError) as caught:
        hub.pull(REPO)
    assert caught.value.expected == hashlib.sha256(CONTENT).hexdigest() != caught.value.found
    assert not hub.installed() and not leftovers() and not list(cache().rglob("*.gguf"))
    server.corrupt = False
    assert hub.pull(REPO).path.read_bytes() == CONTENT
    server.longer = 5
    with pytest.raises(ChecksumError):
        hub.pull(f"{REPO}:Q8_0")
    assert not leftovers()


def test_broken_connections_go_on_where_they_were(server):
    server.break_after = MIB
    assert hub.pull(REPO).path.read_bytes() == CONTENT
    assert server.content_sent() == len(CONTENT)
    assert [request.range for request in server.requests if request.sent] == [None] + [
        f"bytes={i * MIB}-" for i in (1, 2, 3)]


def test_an_overloaded_server_is_asked_again(server):
    server.down = 3
    assert hub.pull(REPO).path.read_bytes() == CONTENT
    server.down = 100
    with pytest.raises(HubError, match=r"broke off at 0 of .* 503"):
        hub.pull(f"{REPO}:Q8_0")


def test_a_server_without_ranges_is_read_from_the_beginning(server):
    server.ranges, server.break_after = False, 2 * MIB
    with pytest.raises(HubError, match="broke off"):
        hub.pull(REPO)
    server.break_after = None
    got = hub.pull(REPO)
    assert got.path.read_bytes() == CONTENT and got.resumed == 2 * MIB and got.fetched == len(CONTENT) - 2 * MIB


def test_the_disk_is_looked_at_before(server, monkeypatch):
    usage = shutil.disk_usage(cache().parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=hub_download.RESERVE + MIB))
    with pytest.raises(DiskSpaceError) as caught:
        hub.pull(REPO)
    assert caught.value.needed == len(CONTENT) + hub_download.RESERVE and server.content_sent() == 0
    assert not leftovers()
    assert hub.pull(f"{REPO}:Q8_0").fetched == 500


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_up_is_said_so(server, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(hub_download.Download, "_stream", lambda self, *_: full.write(b"x"))
        with pytest.raises(DiskSpaceError):
            hub.pull(REPO)


def test_a_folder_that_cannot_be_written_is_said_so(server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match="HF_HUB_CACHE"):
        hub.pull(REPO)


def test_a_server_whose_lists_hold_names_alone(server):
    server.bare = True
    assert hub.pull(REPO).path.read_bytes() == CONTENT
    server.add("org/small", {"small.gguf": b"in git"}, lfs=False)
    assert hub.pull("org/small").path.read_bytes() == b"in git"
    server.corrupt = True
    with pytest.raises(ChecksumError):
        hub.pull(f"{REPO}:Q8_0")
    server.add("org/empty", {"empty.gguf": b""})
    with pytest.raises(HubError, match="no size and hash"):
        hub.pull("org/empty")


def test_plain_http_is_used_for_repositories_in_xet_storage(server):
    server.xet = True
    assert hub.pull(REPO).path.read_bytes() == CONTENT
    assert not any("nowhere" in request.path for request in server.requests)


def test_an_endpoint_that_is_no_hub(monkeypatch, server):
    server.repositories[REPO].commits["not a commit"] = {}
    server.repositories[REPO].refs["main"] = "not a commit"
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        hub.pull(REPO)


def test_remove_frees_what_nothing_else_points_at(server):
    old = server.add("org/moving", {"m-Q4_0.gguf": b"same", "n-Q8_0.gguf": b"other"})
    hub.pull("org/moving:Q4_0")
    hub.pull("org/moving:Q8_0")
    server.add("org/moving", {"m-Q4_0.gguf": b"same", "README.md": b"new commit"})
    hub.pull("org/moving:Q4_0")
    gone, freed = hub.remove(f"org/moving:Q4_0@{old[:12]}")
    assert [model.commit for model in gone] == [old] and freed == 0
    gone, freed = hub.remove("org/moving:Q4_0")
    assert freed == len(b"same")
    assert [model.name for model in hub.installed()] == ["org/moving:Q8_0"]
    with pytest.raises(NotPulledError, match="org/moving:Q8_0"):
        hub.remove("org/moving:Q4_0")
    hub.pull(REPO)
    assert hub.remove("org/moving")[1] == len(b"other")
    assert not (cache() / "models--org--moving").exists() and [m.repo for m in hub.installed()] == [REPO]
    with pytest.raises(NotPulledError):
        hub.remove("org/moving")


def test_remove_takes_unfinished_downloads_along(server):
    server.ranges, server.break_after = False, MIB
    with pytest.raises(HubError):
        hub.pull(REPO)
    assert len(leftovers()) == 1 and not hub.installed()
    assert hub.remove(REPO) == ([], MIB) and not leftovers()


def test_the_layout_without_links_works_too(server, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError("links need a right that this user lacks")

    monkeypatch.setattr(Path, "symlink_to", refused)
    got = hub.pull(REPO)
    assert not got.path.is_symlink() and got.path.read_bytes() == CONTENT
    assert hub.pull(REPO).fetched == 0 and got.path.read_bytes() == CONTENT
    [model] = hub.installed()
    assert hub.remove(REPO) == ([model], len(CONTENT)) and not hub.installed()


def test_two_at_once_fetch_a_file_once(server):
    server.bytes_per_second = 20 * MIB
    lines: list[str] = []
    threads = [threading.Thread(target=lambda: hub.pull(REPO, say=lines.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.content_sent() == len(CONTENT) and hub.path_of(REPO).read_bytes() == CONTENT
    assert sum("waiting" in line for line in lines) == 2


# The command line, in processes of its own

MAIN = [sys.executable, "-m", "edge_runtime.cli"]


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAIN, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_pull_that_was_killed_goes_on(server: HubServer):
    server.bytes_per_second = 2 * MIB
    process = subprocess.Popen([*MAIN, "pull", REPO], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (leftovers() and leftovers()[0].stat().st_size > MIB // 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    [partial] = leftovers()
    had = partial.stat().st_size
    assert MIB // 2 < had < len(CONTENT) and partial.read_bytes() == CONTENT[:had]
    server.bytes_per_second = None
    server.requests.clear()
    done = cli("pull", REPO, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["resumed"], facts["fetched"]) == (had, len(CONTENT) - had)
    assert server.content_sent() == len(CONTENT) - had  # not one byte twice
    assert Path(facts["path"]).read_bytes() == CONTENT and not leftovers()


def test_pull_run_list_and_remove(server):
    server.add("org/edge", {"edge-Q4_0.gguf": bundled.path().read_bytes()})
    done = cli("pull", "org/edge")
    assert done.returncode == 0 and "the hash is right" in done.stderr, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == bundled.path().read_bytes()
    assert "it was here already" in cli("pull", "org/edge:Q4_0", "--offline").stderr
    listed = cli("models", "list")
    assert "org/edge:Q4_0" in listed.stdout and str(path) in listed.stdout
    [row] = json.loads(cli("models", "list", "--json").stdout)
    assert row["name"] == "org/edge:Q4_0" and row["nbytes"] == path.stat().st_size
    planned = cli("plan", "org/edge:Q4_0", "--json")
    assert planned.returncode == 0 and json.loads(planned.stdout)["fits"]
    said = cli("run", "-m", "org/edge", "-n", "4", "Hello")
    assert said.returncode == 0 and said.stdout.strip(), said.stderr
    removed = cli("models", "remove", "org/edge:Q4_0")
    assert removed.returncode == 0 and "MB freed" in removed.stderr and not path.exists()
    refused = cli("run", "-m", "org/edge:Q4_0", "Hello")
    assert refused.returncode == 1 and "edge-runtime pull org/edge:Q4_0" in refused.stderr
    assert "no models yet" in cli("models", "list").stderr


def test_pickers_of_models_know_pulled_names(server):
    from edge_runtime.apps.model_host import ModelHost, UnknownModelError

    path = hub.pull(REPO).path
    hub.pull(f"{REPO}:Q8_0")
    host = ModelHost([f"{REPO}:q4_0"])
    assert (host.default, host.known(host.default).path) == (f"{REPO}:Q4_0", path)
    assert [model.name for model in host.models()] == [f"{REPO}:Q4_0", f"{REPO}:Q8_0", "edge-tiny"]
    assert ModelHost(default=REPO).known(REPO).name == f"{REPO}:Q4_0"
    with pytest.raises(UnknownModelError):
        host.known("org/none")
    with pytest.raises(NotPulledError):
        ModelHost(["org/none"])


def test_errors_are_one_line(server):
    for arguments, code, word in ((("pull", "org/missing"), 1, "no such repository"), (("pull", "a b"), 2, "org/repo"),
                                  (("pull", REPO + ":Q6_K"), 2, f"{REPO}:Q8_0"),
                                  (("pull", REPO, "--offline"), 1, "offline"),
                                  (("models", "remove", "org/none"), 1, "models list")):
        done = cli(*arguments)
        assert done.returncode == code and word in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stdout == ""


def test_removing_several_files_is_asked_for(server):
    cli("pull", REPO + ":Q4_0")
    cli("pull", REPO + ":Q8_0")
    refused = cli("models", "remove", REPO)
    assert refused.returncode == 2 and "--yes" in refused.stderr and len(hub.installed()) == 2
    assert cli("models", "remove", REPO, "--yes").returncode == 0 and not hub.installed()


def test_listing_needs_no_network_library():
    code = ("import sys\nfrom edge_runtime.models.hub import installed\ninstalled()\n"
            "print('huggingface_hub' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
