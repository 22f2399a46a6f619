"""`edge-runtime profile` as a user runs it: tables, JSON, a picture, what is stored, and what is refused."""
from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edge_runtime.cli import app
from tests.gguf_factory import write_model

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small.gguf", vocab=600, width=64, layers=2,
                       context_length=512)


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """Where profiles are stored; compiled kernels stay where they are."""
    from edge_runtime.offload import profile_store

    monkeypatch.setattr(profile_store, "folder", lambda: tmp_path / "profiles")
    return tmp_path / "profiles"


def profile(model, *arguments: object):
    return CliRunner().invoke(app, ["profile", str(model), "--seconds", "0.5", *map(str, arguments)])


def test_it_is_measured_once_printed_drawn_and_found_again(model, profiles, tmp_path):
    picture = tmp_path / "drawn" / "curves.png"
    first = profile(model, "--plot", picture)
    assert first.exit_code == 0, first.output
    assert "measured now in" in first.stdout and "x as long" in first.stdout
    for title in ("One of 2 layers without its attention", "Decode attention of a layer on the device",
                  "Prompt attention of a layer on the host", "Copies", "from the host's pages to the device"):
        assert title in first.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in first.stderr
    (stored,) = profiles.iterdir()
    again = profile(model, "--json")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert not found.pop("measured_now") and found == json.loads(stored.read_text()), again.stderr
    assert found["fingerprint"] in first.stdout
    assert found["setting"]["device"] == "onnx:cpu" and found["curves"]["layers"] == 2
    assert profile(model).stdout.replace("stored, measured", "") != first.stdout


def test_fresh_measures_again_and_settings_are_kept_apart(model, profiles):
    one = json.loads(profile(model, "--json").stdout)
    two = json.loads(profile(model, "--json", "--fresh").stdout)
    assert one["measured_now"] and two["measured_now"] and one["fingerprint"] == two["fingerprint"]
    assert one["curves"]["linear"] != two["curves"]["linear"]
    other = json.loads(profile(model, "--json", "--kv", "fp16", "--precision", "int8", "--threads", "2",
                               "--host-cores", "0").stdout)
    assert other["measured_now"] and other["fingerprint"] != one["fingerprint"]
    assert other["setting"] | {"model": ""} == {
        "model": "", "device": "onnx:cpu", "precision": "int8", "kv": "fp16", "device_threads": 1, "host_threads": 1,
        "device_cores": [], "host_cores": [0]}
    assert len(list(profiles.iterdir())) == 2


def test_a_broken_profile_is_said_and_measured_anew(model, profiles):
    profile(model)
    (stored,) = profiles.iterdir()
    stored.write_text(stored.read_text()[:200])
    with pytest.warns(UserWarning, match="not JSON.*measured anew"):
        found = json.loads(profile(model, "--json").stdout)
    assert found["measured_now"] and json.loads(stored.read_text())["fingerprint"] == found["fingerprint"]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--device", "cpu"), ("device", "onnx")), (("--device", "tpu"), ("device", "tpu")),
    (("--kv", "int3"), ("kv", "int8")),
    (("--precision", "int2"), ("precision", "float32")), (("--seconds", "0"), ("seconds",)),
    (("--threads", "0"), ("threads",)), (("--host-cores", "a"), ("host_cores", "0,1")),
    (("--device-cores=-1",), ("device_cores",)), (("--plot", "curves.txt"), ("plot", ".png"))])
def test_wrong_values_are_one_line_and_code_2(model, profiles, arguments, words):
    done = profile(model, *arguments)
    assert done.exit_code == 2 and done.stderr.count("error:") == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_a_model_that_is_not_there_is_one_line_and_code_1(profiles, tmp_path):
    done = profile(tmp_path / "none.gguf")
    assert done.exit_code == 1 and "none.gguf" in done.stderr and "Traceback" not in done.output


def test_help_teaches_by_example():
    done = CliRunner().invoke(app, ["profile", "--help"])
    assert done.exit_code == 0 and "Examples:" in done.stdout and "edge-runtime profile" in done.stdout
