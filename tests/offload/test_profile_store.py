"""Profiles on disk: round trips, files that are broken or from elsewhere, folders that cannot be written."""
from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from edge_runtime.errors import ProfileError
from edge_runtime.offload import profile_store
from edge_runtime.offload.profile_store import Profile, Setting, check, find, path_of, read, save
from tests.offload.test_cost_model import curves

SETTING = Setting("0123abcd", "onnx:cpu", "float32", "int8", 1, 1, (0,), (1,))
MACHINE = {"processor": "Zen 5", "memory": "24 GiB", "onnxruntime": "1.31.1"}
PROFILE = Profile(SETTING, MACHINE, curves(contention_host=1.25, bring=((64, 1e-4), (512, 9e-4))), 41.5,
                  ("linear, 512 rows: extrapolated, the time was up",), "2026-11-21T15:00:00+00:00", (2048, 65536, 512))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_saved_is_found(cache):
    path = save(PROFILE)
    assert path == path_of(SETTING) and path.parent == cache / "profiles"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(SETTING, MACHINE) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no half-written one beside it
    assert json.loads(path.read_text())["fingerprint"] == PROFILE.fingerprint


def test_how_far_it_reaches_may_be_unknown():
    path, value = save(PROFILE), PROFILE.as_json()
    del value["reach"]
    path.write_text(json.dumps(value))
    assert read(path) == dataclasses.replace(PROFILE, reach=())


def test_there_is_none_without_a_file():
    assert find(SETTING, MACHINE) is None


@pytest.mark.parametrize("changed", [
    {"model": "ffff"}, {"device": "onnx:webgpu"}, {"precision": "int8"}, {"kv": "fp16"}, {"device_threads": 2},
    {"host_threads": 2}, {"device_cores": ()}, {"host_cores": (0,)}])
def test_each_setting_has_a_profile_of_its_own(changed):
    other = dataclasses.replace(SETTING, **changed)
    save(PROFILE)
    assert find(other, MACHINE) is None
    assert dataclasses.replace(PROFILE, setting=other).fingerprint != PROFILE.fingerprint
    save(dataclasses.replace(PROFILE, setting=other))
    assert find(SETTING, MACHINE) == PROFILE
    with pytest.raises(ProfileError, match=f"measured for {next(iter(changed))}="):
        check(PROFILE, other, MACHINE, "here")


@pytest.mark.parametrize(("here", "words"), [
    ({**MACHINE, "processor": "Zen 6"}, "processor was Zen 5, here it is Zen 6"),
    ({**MACHINE, "driver": "570"}, "driver was unknown, here it is 570"),
    ({"processor": "Zen 5", "memory": "24 GiB"}, "onnxruntime was 1.31.1, here it is unknown")])
def test_a_profile_from_another_machine_is_passed_over_and_said_so(here, words):
    save(PROFILE)
    with pytest.warns(UserWarning, match=words):
        assert find(SETTING, here) is None
    with pytest.raises(ProfileError, match=words):
        check(PROFILE, SETTING, here, "here")
    save(dataclasses.replace(PROFILE, machine=here))
    assert find(SETTING, here) is not None


def broken(**changed) -> str:
    return json.dumps({**PROFILE.as_json(), **changed})


@pytest.mark.parametrize(("text", "words"), [
    ("", "not JSON"), ("{", "not JSON"), (b"\xff\xfe\x00", "not JSON"), ("[" * 100_000, "not JSON"),
    ("[]", "JSON object"), ("{}", "format None is not 1"), (broken(format=2), "format 2 is not 1"),
    (broken(machine=None), "machine"), (broken(machine={"memory": 24}), "machine"), (broken(notes="none"), "notes"),
    (broken(reach="far"), "reach"), (broken(reach=[1, -1]), "reach"), (broken(reach=[True]), "reach"),
    (broken(seconds=-1), "seconds"), (broken(seconds=True), "seconds"), (broken(setting=None), "setting"),
    (broken(setting={**dataclasses.asdict(SETTING), "kv": 8}), "setting kv=8"),
    (broken(setting={**dataclasses.asdict(SETTING), "host_cores": ["1"]}), "setting host_cores"),
    (broken(curves=None), "curves"), (broken(curves={**PROFILE.curves.as_json(), "linear": []}), "linear"),
    (broken(curves={**PROFILE.curves.as_json(), "linear": [[1, float("nan")]]}), "linear"),
    (broken(machine={**MACHINE, "processor": "another"}), "fingerprint")])
def test_a_broken_file_is_an_error_to_read_and_a_warning_to_find(text, words):
    path = save(PROFILE)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProfileError, match=words) as error:
        read(path)
    assert str(path) in str(error.value) and "edge-runtime profile --fresh" in str(error.value)
    with pytest.warns(UserWarning, match="measured anew"):
        assert find(SETTING, MACHINE) is None
    save(PROFILE)
    assert find(SETTING, MACHINE) == PROFILE


def test_a_file_cut_off_anywhere_is_noticed():
    path = save(PROFILE)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError):
            read(path)


def test_a_file_too_large_is_not_read(monkeypatch):
    path = save(PROFILE)
    monkeypatch.setattr(profile_store, "LARGEST", 100)
    with pytest.raises(ProfileError, match="too many"):
        read(path)


def test_a_folder_in_the_way_is_a_warning_and_an_error_to_write_to():
    path_of(SETTING).mkdir(parents=True)
    assert find(SETTING, MACHINE) is None
    with pytest.raises(OSError):
        save(PROFILE)
    assert not list(path_of(SETTING).parent.glob("*.part"))


def test_a_write_that_fails_leaves_the_old_profile(monkeypatch):
    path = save(PROFILE)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile_store.json, "dump", fail)
    with pytest.raises(OSError):
        save(dataclasses.replace(PROFILE, seconds=1.0))
    assert read(path) == PROFILE and len(list(path.parent.iterdir())) == 1
