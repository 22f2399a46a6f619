"""Killed, locked out, refused, out of room: nothing is lost, nothing comes twice."""
from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_runtime.apps.summarizer import Summarizer, Target, Totals
from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.errors import JobError, LedgerBusyError, ManifestError, StorageError
from edge_runtime.apps.summarizer.ledger import Ledger
from edge_runtime.llm import LLM
from edge_runtime.sampling import SamplingParams
from tests.gguf_factory import write_model

resource = pytest.importorskip("resource")  # not on Windows
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")
KILLS = 20
TEXT = "The {i}th report tells of {n} boats, which came on day {d} and left soon. "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, context_length=256)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Short and long documents, and some that cannot be read."""
    folder = tmp_path_factory.mktemp("in")
    rng = random.Random(5)
    for i in range(40):
        text = "\n\n".join(TEXT.format(i=i, n=rng.randrange(99), d=k) for k in range(rng.choice((1, 1, 2, 12))))
        (folder / f"{i:02}.txt").write_text(text)
    (folder / "13.txt").write_bytes(b"\0binary")
    (folder / "27.txt").write_text("")
    return folder


def command(model: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "edge_runtime.cli", "summarize", "-m", str(model), "-t", "1", *map(str, arguments)]


def run(model: Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(model, *arguments), capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def killed(model: Path, output: Path, after: float, *arguments: object) -> bool:
    """Runs until `after` seconds after the ledger is there, then kill -9; True where it was still running."""
    ledger = output / ".ledger" if output.is_dir() or "markdown" in arguments else Path(f"{output}.ledger")
    process = subprocess.Popen(command(model, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.perf_counter()
    while not ledger.exists() and process.poll() is None and time.perf_counter() - began < 60:
        time.sleep(0.002)
    time.sleep(after)
    process.kill()
    return process.wait() == -signal.SIGKILL


def wholes(output: Path) -> dict[str, bytes]:
    """Every file of an output, without the ledger."""
    if output.is_file():
        return {"": output.read_bytes()}
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*.md"))}


@pytest.mark.parametrize("form, kills", [("jsonl", KILLS - 6), ("markdown", 6)])
def test_killed_at_random_points_the_output_is_the_same(model, inputs, tmp_path, form, kills):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    options = (inputs, "-n", "24", "--prompt", "Sum:\n{document}", "--format", form)
    whole, output = tmp_path / "whole", tmp_path / "killed"
    began = time.perf_counter()
    done = run(model, *options, "-o", whole)
    assert done.returncode == 1 and "38 of 40" in done.stderr, done.stderr
    took = float(done.stderr.split("38 of 40 documents in ")[1].split(" s")[0])
    assert time.perf_counter() - began < 120
    hits, runs = 0, 0
    while hits < kills and runs < 3 * kills:
        runs += 1
        hits += killed(model, output, rng.random() * (0.2 + took / 4), *options, "-o", output)
        if runs % 5 == 0 and output.is_file():  # what a kill leaves is a beginning of the whole, perhaps a cut line
            assert whole.read_bytes().startswith(output.read_bytes()[:-200])
    last = run(model, *options, "-o", output)
    assert last.returncode == 1, last.stderr
    assert wholes(output) == wholes(whole)
    folder = form == "markdown"
    with sqlite3.connect(output / ".ledger" if folder else f"{output}.ledger") as db:
        assert db.execute("SELECT count(*), count(DISTINCT document) FROM documents").fetchone() == (40, 40)
        assert db.execute("SELECT count(*) FROM documents WHERE status = 'pending'").fetchone() == (0,)
        assert db.execute("SELECT max(attempts) FROM chunks WHERE status = 'done'").fetchone() == (1,)  # none twice
    print(f"{hits} kills in {runs} runs")
    assert hits >= kills // 2


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, threads=1) as opened:
        yield opened


def summarize(llm: LLM, folder: Path, out: Path, *, tokens: int = 4, prompt: str = "Sum:{document}",
              fresh: bool = False) -> Totals:
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    job = Summarizer(llm, params=params, prompt=prompt)
    list(job.run([folder], Target(out), fresh=fresh))
    return job.totals


def test_an_output_that_was_tampered_with_is_written_again(llm, inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    assert summarize(llm, inputs, out).failed == 2
    whole = out.read_bytes()
    for damage in (whole + b"{half a line", whole[:100], b"", None):
        if damage is None:
            out.unlink()
        else:
            out.write_bytes(damage)
        again = summarize(llm, inputs, out)
        assert (again.kept, again.requests, again.failed) == (38, 0, 2)
        assert out.read_bytes() == whole


def test_inputs_that_changed_are_done_again_and_others_kept(llm, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "o.jsonl"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(TEXT.format(i=i, n=i, d=i))
    assert summarize(llm, folder, out).documents == 6
    before = [json.loads(line) for line in out.read_text().splitlines()]
    (folder / "2.txt").write_text("Something else now.")
    (folder / "25.txt").write_text("Something new.")
    (folder / "5.txt").unlink()
    totals = summarize(llm, folder, out)
    assert (totals.kept, totals.reused, totals.requests) == (2, 2, 2)
    after = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(row["path"]).name for row in after] == ["0.txt", "1.txt", "2.txt", "25.txt", "3.txt", "4.txt"]
    assert after[:2] == before[:2] and after[4:] == before[3:5] and after[2]["summary"] != before[2]["summary"]
    for name in ("25.txt", "3.txt", "4.txt"):
        (folder / name).unlink()
    totals = summarize(llm, folder, out)
    assert (totals.kept, totals.requests) == (3, 0)
    assert [json.loads(line) for line in out.read_text().splitlines()] == after[:3]


def test_other_options_on_the_same_output_are_refused(llm, inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    file = inputs / "00.txt"
    summarize(llm, file, out)
    whole = out.read_bytes()
    for other in ({"tokens": 5}, {"prompt": "Tell:{document}"}):
        with pytest.raises(ManifestError, match="--fresh"):
            summarize(llm, file, out, **other)
        assert out.read_bytes() == whole
    summarize(llm, file, out, tokens=5, fresh=True)
    assert out.read_bytes() != whole


def test_two_documents_that_ask_the_same_ask_once(llm, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("The same text.")
    assert summarize(llm, tmp_path, tmp_path / "out" / "o.jsonl").requests == 1


def test_another_process_on_the_same_output_is_told_so(model, inputs, tmp_path):
    out = tmp_path / "o.jsonl"
    options = (inputs, "-n", "64", "--prompt", "Sum:\n{document}", "-o", out)
    first = subprocess.Popen(command(model, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not Path(f"{out}.ledger").exists():
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)  # it works on, as far as the second can tell
        second = run(model, *options)
        assert second.returncode == 1 and f"process {first.pid}" in second.stderr and "--out" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
        first.kill()
        first.wait()
    assert run(model, *options).returncode == 1  # the lock went with its owner
    assert not Path(f"{out}.ledger.lock").exists()


def test_a_full_disk_is_told_and_the_job_goes_on_afterwards(model, inputs, tmp_path):
    """A limit on file sizes stands for the disk: the system refuses the write in the middle."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    options = (inputs, "-n", "24", "--prompt", "Sum:\n{document}")
    assert run(model, *options, "-o", whole).returncode == 1

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = run(model, *options, "-o", out, preexec_fn=limited)
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert "make room, and give the same command again" in full.stderr
    done = run(model, *options, "-o", out)
    assert done.returncode == 1 and out.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_standard_output_is_told(model, inputs):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(model, inputs / "00.txt", "-n", "4"), stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_ledger_keeps_answers_and_forgets_what_was_not_committed(tmp_path):
    ask, other = Ask("chat", [{"role": "user", "content": "a"}]), Ask("chat", [{"role": "user", "content": "b"}])
    ledger = Ledger(tmp_path / "l", {"a": 1})
    ledger.begin(0, "name \udcff", b"h")
    ledger.record(0, ask, None, "it failed")
    assert ledger.answer(ask) is None
    ledger.record(0, ask, Answer("said", prompt_tokens=3, extra={"mode": {"a": 1}}))
    ledger.commit()
    ledger.record(0, other, Answer("lost"))
    with pytest.raises(LedgerBusyError):
        Ledger(tmp_path / "l", {"a": 1})
    ledger.close()
    again = Ledger(tmp_path / "l", {"a": 1})
    assert again.resumed and again.answer(other) is None
    assert again.answer(ask) == Answer("said", prompt_tokens=3, extra={"mode": {"a": 1}})
    again.close()
    with pytest.raises(ManifestError, match="a: 1 then, 2 now"):
        Ledger(tmp_path / "l", {"a": 2})
    (tmp_path / "l").write_bytes(b"no database at all, but long enough to look like a file" * 40)
    with pytest.raises(Exception, match="--fresh"):
        Ledger(tmp_path / "l", {"a": 1})


@pytest.mark.parametrize("harm, said", [
    ("UPDATE job SET value = json_set(value, '$.version', 9)  WHERE key = 'manifest'", "newer version"),
    ("UPDATE job SET value = '{' WHERE key = 'manifest'", "damaged"),
    ("UPDATE job SET value = '[]' WHERE key = 'manifest'", "damaged"),
    ("UPDATE documents SET result = '{'", "damaged"),
    ("UPDATE chunks SET answer = '{'", "damaged"),
    ("UPDATE chunks SET answer = '{\"odd\": 1}'", "damaged"),
    ("ALTER TABLE job RENAME COLUMN value TO other", "damaged"),
])
def test_a_ledger_that_cannot_be_read_is_told(tmp_path, harm, said):
    ask = Ask("chat", [{"role": "user", "content": "a"}])
    ledger = Ledger(tmp_path / "l", {"a": 1})
    ledger.begin(0, "name", b"h")
    ledger.record(0, ask, Answer("said"))
    ledger.finish(0, {"text": "said"}, None, 1.0)
    ledger.commit()
    ledger.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "l")) as db:
        db.execute(harm)
        db.commit()
    with pytest.raises(JobError, match=f"{said}.*--fresh"), \
            contextlib.closing(Ledger(tmp_path / "l", {"a": 1})) as again:
        again.answer(ask)
        again.entry(0)


def test_a_ledger_where_nothing_can_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Ledger(Target(tmp_path / "file" / "o.jsonl").ledger, {})
