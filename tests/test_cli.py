"""The commands as a user runs them, in a process of their own, on a small random model."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from edge_runtime.cli import app
from edge_runtime.cli_common import compiling
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.quantize_file import quantize_gguf
from tests.gguf_factory import write_model

COMMANDS = ("run", "summarize", "bench", "plan", "doctor", "quantize", "calibrate", "eval")
MAIN = [sys.executable, "-m", "edge_runtime.cli"]


def cli(*arguments: str, stdin: bytes | None = b"", timeout: float = 240) -> subprocess.CompletedProcess:
    done = subprocess.run([*MAIN, *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout,
                          env={**os.environ, "COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, width=64, layers=2,
                       context_length=512)


def assert_clear(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One line that names what is wrong, and no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") + done.stderr.count("Error:") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command):
    done = cli(command, "--help")
    assert done.returncode == 0
    assert "Examples:" in done.stdout and f"edge-runtime {command}" in done.stdout


def test_version_and_the_list_of_commands():
    from edge_runtime import __version__

    assert cli("--version").stdout == f"edge-runtime {__version__}\n"
    shown = cli("--help").stdout
    assert all(command in shown for command in COMMANDS)


def test_run_streams_a_reply_and_tells_its_figures(model):
    done = cli("run", "-m", model, "-n", "12", "--ignore-eos", "--seed", "1", "--stats", "--plan", "hello there")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and len(done.stdout) > 1
    assert "KV per 1k tokens" in done.stderr and "reply 12 tokens" in done.stderr
    again = cli("run", "-m", model, "-n", "12", "--ignore-eos", "--seed", "1", "hello there")
    assert again.stdout == done.stdout and "tokens/s" not in again.stderr


def test_run_reads_standard_input_and_raw_differs_from_chat(model):
    options = ("run", "-m", model, "-n", "8", "--ignore-eos", "--temperature", "0")
    piped, dash, given = cli(*options, stdin=b"one two"), cli(*options, "-", stdin=b"one two"), cli(*options, "one two")
    assert piped.stdout == dash.stdout == given.stdout
    assert cli(*options, "--raw", "one two").stdout != given.stdout


@pytest.mark.parametrize("arguments, code, words", [
    (("--temperature", "-1"), 2, ("temperature", "-1")),
    (("--top-p", "0"), 2, ("top_p",)),
    (("--context", "many"), 2, ("context", "many")),
    (("--context", "100000"), 2, ("100000", "512")),
    (("--threads", "0"), 2, ("threads",)),
    (("--kv", "int3"), 2, ("int3", "int8")),
    (("--device", "gpu"), 2, ("gpu", "cpu")),
    (("--logit-bias", "x=1"), 2, ("logit_bias",)),
    (("--logit-bias", "600=1"), 2, ("600",)),
    (("--raw", "--system", "s"), 2, ("system",)),
    (("--no-such-option",), 2, ("--no-such-option",)),
])
def test_wrong_values_are_one_line_and_code_2(model, arguments, code, words):
    done = CliRunner().invoke(app, ["run", "-m", str(model), *arguments, "hello"])
    assert_clear(subprocess.CompletedProcess([], done.exit_code, done.stdout, done.stderr), code, *words)


def test_what_fails_is_one_line_and_code_1(model, tmp_path):
    assert_clear(cli("run", "-m", tmp_path / "none.gguf", "hello"), 1, "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    assert_clear(cli("run", "-m", broken, "hello"), 1, "broken.gguf", "corrupt at byte")
    assert_clear(cli("run", "-m", model, "word " * 2000), 1, "512")
    assert_clear(cli("run", "-m", tmp_path, "hello"), 1, str(tmp_path))


def test_input_that_is_no_text_is_refused(model):
    assert_clear(cli("run", "-m", model, stdin=b"ab\xff\xfe"), 2, "UTF-8", "byte 2")


def interruptible() -> None:
    """In the child: a shell's background job, as which the tests may run, ignores Ctrl-C and hands that down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_cancels_cleanly(model):
    process = subprocess.Popen([*MAIN, "run", "-m", str(model), "-n", "400", "--ignore-eos", "--context", "512", "hi"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible)
    assert process.stdout is not None
    process.stdout.read(1)  # the reply has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # A small model may have finished before the signal came.
    assert (process.returncode, err.decode().strip().splitlines()[-1:]) in ((130, ["cancelled"]), (0, []))
    assert b"Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_while_summarizing_ends_soon(model, tmp_path):
    for i in range(1000):  # more than are done before the signal comes
        (tmp_path / f"{i}.txt").write_text(f"number {i} " * 30)
    process = subprocess.Popen([*MAIN, "summarize", "-m", str(model), str(tmp_path), "-n", "256"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert time.perf_counter() - began < 20


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_goes_away_is_met_quietly(model, tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    process = subprocess.Popen([*MAIN, "summarize", "-m", str(model), str(tmp_path), "-n", "64"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=60) in (141, 0)
    assert b"Traceback" not in err and b"Exception ignored" not in err


def test_plan_needs_no_loading_and_says_what_does_not_fit(model):
    done = cli("plan", model, "--json")
    found = json.loads(done.stdout)
    assert found["fits"] and found["context"] == 512 and found["weights_bytes"] > 0
    assert "largest context that fits" in cli("plan", model).stdout
    small = cli("plan", model, "--memory-gb", "0.01")
    assert small.returncode == 1 and "error:" in small.stderr and "KV per 1k tokens" in small.stderr
    refused = cli("plan", model, "--memory-gb", "0.01", "--json")
    assert refused.returncode == 1 and json.loads(refused.stdout)["fits"] is False


def test_quantize_writes_a_smaller_file_that_runs(tmp_path):
    source = write_model(tmp_path / "f16.gguf", types="F16", width=256, ffn=256, vocab=600)
    target = tmp_path / "q4.gguf"
    done = cli("quantize", source, target, "--type", "q4_k_m")
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size < 0.6 * source.stat().st_size and "MB" in done.stderr
    assert cli("run", "-m", target, "-n", "3", "hello").returncode == 0
    assert_clear(cli("quantize", source, target), 2, "--force")
    assert_clear(cli("quantize", source, tmp_path / "x.gguf", "--type", "Q9"), 1, "Q9", "Q4_K_M")
    assert_clear(cli("quantize", target, tmp_path / "y.gguf"), 1, "float")


def test_quantize_replaces_files_alone(tmp_path):
    source = write_model(tmp_path / "f16.gguf", types="F16")
    for target, words in ((tmp_path, "folder"), (tmp_path / "none" / "x.gguf", "folder that exists")):
        assert_clear(cli("quantize", source, target, "--force"), 2, words)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert_clear(cli("quantize", source, tmp_path / "pipe", "--force"), 2, "device")
        with pytest.raises(InvalidRequestError, match="device"):
            quantize_gguf(source, tmp_path / "pipe", "Q8_0")
        assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(os.name == "nt", reason="POSIX descriptors")
@pytest.mark.parametrize("command", ["plan", "run"])
def test_closed_standard_output_is_one_line(model, command):
    arguments = ("plan", model) if command == "plan" else ("run", "-m", model, "-n", "3", "hi")
    done = subprocess.run([*MAIN, *map(str, arguments)], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          preexec_fn=lambda: os.close(1), timeout=240)
    assert_clear(subprocess.CompletedProcess([], done.returncode, "", done.stderr.decode()), 1, "standard output")


def test_a_terminal_that_cannot_show_a_reply_gets_escapes(tmp_path):
    model = write_model(tmp_path / "m.gguf", metadata={"general.name": "Modell f\u00fcr \u65e5\u672c"})
    done = subprocess.run([*MAIN, "plan", str(model)], capture_output=True, timeout=240,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"Modell f\\xfcr \\u65e5\\u672c" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX folders")
def test_kernels_that_cannot_be_kept_are_told(monkeypatch, capsys):
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", os.devnull)
    with compiling() as show:
        show("a kernel")
    assert "cannot be kept" in capsys.readouterr().err


def test_doctor_names_what_is_here():
    facts = json.loads(cli("doctor", "--json", "--no-measure").stdout)
    assert facts["threads"] >= 1 and facts["memory"]["total"] > facts["memory"]["available"] > 0
    assert "cpu" in facts["devices"] and facts["versions"]["numba"] != "missing"
    extras = {extra["name"]: extra for extra in facts["extras"]}
    assert {"llamacpp", "distill"} <= set(extras)
    for name, extra in extras.items():
        assert (extra["mend"] == f"pip install 'edge-runtime[{name}]'") == bool(extra["missing"])


def test_doctor_says_what_an_instruction_set_lacks(monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_ISA", "z80")
    done = cli("doctor", "--no-measure")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "z80" in done.stdout and "problem" in done.stdout


def test_doctor_warms_a_model(model, monkeypatch, tmp_path):
    done = cli("doctor", "--warm", "-m", model, "--no-measure", "--json")
    assert "Traceback" not in done.stderr and json.loads(done.stdout)["warmed"]["compiled"] >= 0
