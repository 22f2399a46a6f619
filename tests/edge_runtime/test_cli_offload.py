"""Offload on the command line: `plan` for a device of so much memory, `run --explain`, values that are refused."""
from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import hybrid_model
from edge_runtime.cli import app
from edge_runtime.offload import profile_store
from tests.gguf_factory import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, width=64, layers=2, types="Q4_0",
                       context_length=512)


@pytest.fixture(autouse=True)
def quick_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid_model, "PROFILE_SECONDS", 0.6)
    monkeypatch.setattr(profile_store, "folder", lambda: tmp_path / "profiles")


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def needed(model) -> int:
    """Bytes of a device that the model's weights and one step take."""
    there = json.loads(cli("plan", model, "--device", "webgpu", "--offload", "on", "--json").stdout)["on_device"]
    return there["weights_bytes"] + there["working_bytes"]


def test_plan_for_a_device_of_so_much_memory(model):
    base = needed(model)
    options = ("--device", "webgpu", "--context", 512, "--max-batch", 8)
    found = json.loads(cli("plan", model, *options, "--device-memory-gb", 2, "--json").stdout)
    assert found["fits"] and not found["on_device"]["hybrid"] and found["kv"] == "fp32"
    one = found["on_device"]["kv_least_bytes"]
    found = json.loads(cli("plan", model, *options, "--device-memory-gb", (base + 2 * one) / 1e9, "--json").stdout)
    there = found["on_device"]
    assert found["fits"] and there["hybrid"] and there["sequences"] == 2 and found["kv"] == "fp16"
    assert there["kv_pool_bytes"] == pytest.approx(2 * one, abs=2) and "2 of up to 8" in found["placement"]
    text = cli("plan", model, *options, "--device-memory-gb", (base + 2 * one) / 1e9).stdout
    assert re.search(r"^placement +hybrid: weights in the memory of onnx:webgpu", text, re.M)
    assert re.search(r"^why +8 sequences of 512 tokens would take", text, re.M)
    small = cli("plan", model, *options, "--offload", "on", "--device-memory-gb", base / 1e9, "--json")
    assert small.exit_code == 1 and not json.loads(small.stdout)["fits"] and "device_memory of" in small.stderr


def test_run_explains_who_attended(model):
    size = (needed(model) + 512 * 1024) / 1e9
    done = cli("run", "-m", model, "--device", "onnx:cpu", "--offload", "on", "--device-memory-gb", size, "--context",
               512, "-n", 12, "--ignore-eos", "--temperature", 0, "--explain", "--plan", "hello there")
    assert done.exit_code == 0, done.stderr
    assert "measuring what this machine takes" in done.stderr and "placement" in done.stderr
    assert re.search(r"^mode +laps +rows device \+ host +predicted ms +measured ms +error +bound by$", done.stderr,
                     re.M)
    laps = re.findall(r"^(device-only|synchronous|pipelined|overlap|streaming) +(\d+) ", done.stderr, re.M)
    assert sum(int(count) for _, count in laps) >= 11
    assert "considered for the last lap" in done.stderr
    again = cli("run", "-m", model, "--device", "onnx:cpu", "--offload", "on", "--device-memory-gb", size, "--context",
                512, "-n", 12, "--ignore-eos", "--temperature", 0, "hello there")
    assert again.stdout == done.stdout and "measuring" not in again.stderr and "mode " not in again.stderr
    plain = cli("run", "-m", model, "--device", "cpu", "-n", 2, "--explain", "hello")
    assert plain.exit_code == 0 and "nothing to schedule" in plain.stderr


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("arguments, words", [
    (("--offload", "maybe"), ("offload='maybe'", "auto, on or off")),
    (("--device-memory-gb", "0"), ("device_memory_gb=0.0",)),
    (("--device-memory-gb", "-4"), ("device_memory_gb=-4.0",)),
    (("--device-memory-gb", "1000000"), ("device_memory=", "at most")),
    (("--tbt-ms", "0"), ("tbt_ms=0.0",)),
    (("--tbt-ms", "5", "--offload", "off"), ("tbt_ms=5.0", "offload")),
    (("--offload", "on", "--device", "cpu"), ("offload='on'", "accelerator")),
    (("--kv", "int8"), ("kv='int8'", 'offload="on"'))])
def test_wrong_values_are_one_line_and_code_2(model, command, arguments, words):
    given = ("--device", "onnx:cpu", *arguments)
    done = cli("run", "-m", model, *given, "hello") if command == "run" else cli("plan", model, *given)
    assert done.exit_code == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
