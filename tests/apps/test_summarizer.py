"""The summarizer on a small random model: order, strategies, failures, totals, the command."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_runtime.apps.documents import Document
from edge_runtime.apps.summarizer import Summarizer, Summary, Target, closing_report
from edge_runtime.cli import app
from edge_runtime.errors import InvalidRequestError, NumericalError
from edge_runtime.llm import LLM
from edge_runtime.sampling import SamplingParams
from tests.gguf_factory import write_model

CONTEXT = 256


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, context_length=CONTEXT)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, threads=1, max_batch=4) as opened:
        yield opened


def summarizer(llm, max_tokens=8, prompt="Summarize.\n\n{document}", **options) -> Summarizer:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Summarizer(llm, params=params, prompt=prompt, **options)


def summaries(job: Summarizer, paths, target: Target | None = None) -> list[Summary]:
    return [Summary.of(entry) for entry in job.run(paths, target)]


def test_summaries_come_in_order_and_failures_in_their_place(llm, tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"Document number {i}. " * (1 + i % 3))
    (tmp_path / "05.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "07.txt").write_bytes(b"\0\1\2")
    job = summarizer(llm)
    found = summaries(job, [tmp_path, tmp_path / "missing.txt"])
    assert [s.path.rpartition("/")[2] for s in found] == [f"{i:02}.txt" for i in range(12)] + ["missing.txt"]
    assert {s.path.rpartition("/")[2] for s in found if s.error is not None} == {"05.txt", "07.txt", "missing.txt"}
    good = [s for s in found if s.error is None]
    assert all(s.chunks == 1 and s.completion_tokens == 8 and not s.parts and not s.complete for s in good)
    totals = job.totals
    assert (totals.documents, totals.failed, totals.requests) == (13, 3, 10)
    assert totals.completion_tokens == 8 * len(good) == sum(s.completion_tokens for s in good)
    assert totals.prompt_tokens == sum(s.prompt_tokens for s in good) > 0
    assert totals.completion_rate > 0
    assert "10 of 13 documents" in closing_report(totals) and "slowest" in closing_report(totals)


def test_a_document_alone_and_in_a_batch_has_the_same_summary(llm, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"Document number {i}. " * (1 + i))
    together = [s.text for s in summaries(summarizer(llm), [tmp_path])]
    alone = [s.text for i in range(6) for s in summaries(summarizer(llm), [tmp_path / f"{i}.txt"])]
    assert together == alone
    assert summarizer(llm).summarize(Document(tmp_path / "x", "Document number 2. " * 3)).text == together[2]


def test_long_documents_are_cut_and_their_parts_summarized(llm, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"Paragraph {i} tells something of its own." for i in range(60)))
    [summary] = summaries(summarizer(llm), [file])
    assert summary.error is None and summary.text and summary.strategy == "map-reduce"
    assert summary.chunks > 2 and len(summary.parts) == summary.chunks
    whole = len(llm.tokenize(file.read_text(), add_special=False))
    assert summary.prompt_tokens > whole  # every part was read
    assert summary.completion_tokens >= 8 * summary.chunks
    [refined] = summaries(summarizer(llm, strategy="refine"), [file])
    assert refined.strategy == "refine" and refined.completion_tokens == 8 * refined.chunks and not refined.parts
    [refused] = summaries(summarizer(llm, strategy="whole"), [file])
    assert refused.error is not None and "exceed the context" in refused.error


def test_every_request_fits_the_context(llm, tmp_path):
    """Texts without any border, of every length around the limit."""
    job = summarizer(llm, max_tokens=16)
    for length in range(job.chunk_tokens - 3, job.chunk_tokens + 4):
        (tmp_path / f"{length}.txt").write_text("@" * length)
    assert [s.error for s in summaries(job, [tmp_path])] == [None] * 7


@pytest.mark.parametrize("options, word", [
    ({"max_tokens": CONTEXT}, "max_tokens"), ({"chunk_tokens": CONTEXT}, "chunk_tokens"),
    ({"prompt": "Summarize this."}, "document"), ({"compress": 0}, "compress"), ({"compress": 1.5}, "compress"),
    ({"strategy": "none"}, "strategy"), ({"style": "rhymes"}, "style"), ({"length": "epic"}, "length"),
    ({"length": -3}, "length"),
])
def test_what_cannot_be_is_refused(llm, options, word):
    with pytest.raises(InvalidRequestError, match=word):
        summarizer(llm, **options)


def test_a_caller_that_stops_early_leaves_nothing_running(llm, tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"word {i} " * 40)
    job = summarizer(llm, max_tokens=60)
    entries = job.run([tmp_path])
    assert next(entries).error is None
    entries.close()
    assert job.totals.documents < 40
    [again] = summaries(summarizer(llm), [tmp_path / "00.txt"])
    assert again.error is None


def test_a_model_without_chat_template_is_asked_with_plain_text(tmp_path):
    model = write_model(tmp_path / "plain.gguf", vocab=600, context_length=CONTEXT, chat_template=None)
    (tmp_path / "a.txt").write_text("Some text. " * 80)
    with LLM(model, threads=1) as plain:
        [summary] = summaries(summarizer(plain), [tmp_path / "a.txt"])
    assert summary.error is None and summary.chunks > 1


def test_shared_instructions_are_read_once(llm, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} is a number.")
    job = summarizer(llm, prompt="These are the rules of the house, and they are many. " * 4 + "\n\n{document}")
    assert all(s.error is None for s in summaries(job, [tmp_path]))
    assert job.totals.cached_tokens >= 7 * 64
    assert "prefix cache" in closing_report(job.totals) and "mode: " in closing_report(job.totals)


def test_the_report_tells_of_exits_and_modes(llm, path, tmp_path):
    (tmp_path / "a.txt").write_text("A text about boats.")
    early_exit = {"missing_kv": "verify", "criterion": "layer", "layer": 1}
    with pytest.warns(UserWarning), LLM(path, threads=1, exit_layers=[1], early_exit=early_exit) as early:
        job = summarizer(early)
        [summary] = summaries(job, [tmp_path])
    assert summary.text == summaries(summarizer(llm), [tmp_path])[0].text  # checked drafts change nothing
    report = closing_report(job.totals)
    assert "exits: layer " in report and "layers run: " in report and "mode: " in report


def test_requests_that_fail_are_tried_again_and_then_reported(llm, tmp_path, monkeypatch):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{i} is a number.")
    job = summarizer(llm)
    expected = [s.text for s in summaries(job, [tmp_path])]
    real, seen = job.backend.ask, []

    def ask(ask, stop, tick):
        number = ask.content[0]["content"][12]
        seen.append(number)
        if number == "4" or (number == "2" and seen.count("2") == 1):
            raise NumericalError("played")
        return real(ask, stop, tick)

    monkeypatch.setattr(job.backend, "ask", ask)
    found = summaries(job, [tmp_path])
    assert [s.text for s in found] == [*expected[:4], None, expected[5]]
    assert found[4].error == "played" and seen.count("4") == 3 and seen.count("2") == 2
    assert job.totals.retried == 3 and job.totals.failed == 1


def test_a_file_that_cannot_be_read_now_is_tried_again(llm, tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"The text of {name}.")
    expected = [s.text for s in summaries(summarizer(llm), [tmp_path])]
    real, failures = Path.open, {"a.txt": 2, "b.txt": 9}

    def fails(path: Path, *arguments):
        if failures.get(path.name):
            failures[path.name] -= 1
            raise OSError(5, "Input/output error", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(Path, "open", fails)
    first, second = summaries(summarizer(llm), [tmp_path])
    assert first.text == expected[0] and "Input/output error" in (second.error or "") and failures["b.txt"] == 6


def test_an_error_of_ours_ends_one_document_only(llm, tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"{i} is a number.")
    job = summarizer(llm)
    real = job.documents.job
    monkeypatch.setattr(job.documents, "job", lambda text: 1 / 0 if text.startswith("1") else real(text))
    found = summaries(job, [tmp_path])
    assert "ZeroDivisionError" in (found[1].error or "") and found[0].text and found[2].text


def run(*arguments) -> object:
    return CliRunner().invoke(app, ["summarize", *map(str, arguments)])


def test_command_writes_lines_and_reports(path, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("A good text.")
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff\xff")
    out = tmp_path / "deep" / "out.jsonl"
    arguments = ("-m", path, tmp_path / "in", "-o", out, "-n", "4", "--prompt", "Sum:{document}")
    done = run(*arguments, "--show")
    assert done.exit_code == 1 and done.stdout == ""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["path"].rpartition("/")[2] for row in rows] == ["bad.txt", "good.txt"]
    assert rows[0]["summary"] is None and "UTF-8" in rows[0]["error"]
    assert isinstance(rows[1]["summary"], str) and "error" not in rows[1] and rows[1]["prompt_tokens"] > 4
    for words in ("KV per 1k tokens", "bad.txt", "1 of 2 documents", "tokens/s", "ETA", "slowest"):
        assert words in done.stderr
    only = run("-m", path, tmp_path / "in" / "good.txt", "-n", "4", "--prompt", "Sum:{document}")
    assert only.exit_code == 0 and json.loads(only.stdout)["completion_tokens"] == rows[1]["completion_tokens"]
    assert run("-m", path, tmp_path / "in" / "good.txt", "-n", "4", "-o", os.devnull).exit_code == 0
    (tmp_path / "in" / "bad.txt").write_bytes(b"mended")
    again = run(*arguments)
    assert again.exit_code == 0 and "1 answers were in the ledger" in again.stderr
    mended = [json.loads(line) for line in out.read_text().splitlines()]
    assert mended[1] == rows[1] and isinstance(mended[0]["summary"], str)


def test_command_writes_a_markdown_file_per_document(path, tmp_path):
    for name in ("in/a.txt", "in/sub/a.txt", "in/sub/b.md", "other/in/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"Text of {name}.")
    out = tmp_path / "in" / "summaries"
    arguments = ("-m", path, tmp_path / "in", tmp_path / "other", "-o", out, "--format", "markdown", "-n", "4")
    assert run(*arguments).exit_code == 0
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.md"))
    assert len(found) == 4 and all("\n\nSource: `" in (out / name).read_text() for name in found)
    assert "from before: 4 documents" in run(*arguments).stderr


def test_names_that_no_file_may_have_do_not_stop_the_rest(llm, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["a" * 250 + ".txt", "b" * 249 + "1.txt", "b" * 249 + "2.txt", "名" * 80 + ".txt", "c\nd.txt", "e.txt"]
    for name in names:
        (tmp_path / "in" / name).write_text("A text.")
    with open(os.fsencode(tmp_path / "in") + b"/" + b"\xff" * 240 + b".txt", "w") as file:
        file.write("A text.")
    found = summaries(summarizer(llm), [tmp_path / "in"], Target(tmp_path / "out", "markdown"))
    assert len(found) == 7 and all(summary.error is None for summary in found)
    assert len(list((tmp_path / "out").rglob("*.md"))) == 7
    again = summarizer(llm)
    summaries(again, [tmp_path / "in"], Target(tmp_path / "out", "markdown"))
    assert (again.totals.kept, len(list((tmp_path / "out").rglob("*.md")))) == (7, 7)


@pytest.mark.parametrize("form", ["jsonl", "markdown"])
def test_an_output_that_is_an_input_is_refused_even_afresh(llm, tmp_path, form):
    (tmp_path / "in").mkdir()
    named = tmp_path / "in" / ("mine.txt" if form == "jsonl" else "")
    (tmp_path / "in" / "mine.txt").write_text("precious")
    with pytest.raises(InvalidRequestError, match="a path of its own"):
        list(summarizer(llm).run([named], Target(named, form), fresh=True))
    assert [one.name for one in (tmp_path / "in").iterdir()] == ["mine.txt"]
    assert (tmp_path / "in" / "mine.txt").read_text() == "precious"


def test_command_refuses_what_it_cannot_do(path, tmp_path):
    (tmp_path / "mine.jsonl").write_text("precious\n")
    (tmp_path / "mine.md").write_text("precious too\n")
    for arguments, word in ((["--prompt", "no place"], "document"), (["-n", "0"], "max_tokens"),
                            (["-o", tmp_path], "folder"), (["--format", "xml"], "format"),
                            (["--format", "markdown"], "folder"),
                            (["--format", "markdown", "-o", tmp_path], "--fresh"),
                            (["-o", tmp_path / "mine.jsonl"], "--fresh"),
                            ([tmp_path / "x.jsonl"], "not both")):
        done = run("-m", path, tmp_path, *(["-n", "8"] if "-n" not in arguments else []), *arguments)
        assert done.exit_code == 2 and word in done.stderr, done.stderr
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"
