"""Stored calibrations: found again, and never a crash for what lies in their place."""
from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime import calibration, calibration_store
from edge_runtime.calibration_store import Calibration
from edge_runtime.errors import CalibrationError, InvalidRequestError

ONE = Calibration(
    fingerprint="ab12", model="small", criterion="max_prob", missing_kv="recompute", risk=0.05, confidence=0.95,
    thresholds={2: 0.75, 4: 0.5}, exit_layers=(2, 4, 6), trained=True, layers=8, layers_per_token=5.5,
    measured_risk=0.01, measured_tokens=0.012, documents=100, sequences=100, tuning=30, tokens=5000, seed=0,
    date="2026-01-01T00:00:00+00:00", version="0.1.0", text="examples")


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_what_is_saved_is_found(data_folder):
    path = calibration.save(ONE)
    assert path.is_relative_to(data_folder) and json.loads(path.read_text())["thresholds"] == {"2": 0.75, "4": 0.5}
    assert calibration.find("ab12", "max_prob") == ONE
    assert calibration.load("ab12", "max_prob") == {2: 0.75, 4: 0.5}
    assert not list(path.parent.glob("*.part"))
    assert ONE.saved == pytest.approx(1 - 5.5 / 8)


def test_the_key_is_model_criterion_and_way():
    calibration.save(ONE)
    calibration.save(replace(ONE, missing_kv="propagate", thresholds={6: 0.9}))
    calibration.save(replace(ONE, criterion="entropy", thresholds={4: 0.3}))
    assert calibration.load("ab13", "max_prob") is None
    assert calibration.load("ab12", "margin") is None
    assert calibration.load("ab12", "entropy") == {4: 0.3}
    assert calibration.load("ab12", "max_prob", "propagate") == {6: 0.9}
    assert calibration.load("ab12", "layer") is None
    with pytest.raises(InvalidRequestError, match="verify"):
        calibration.load("ab12", "max_prob", "verify")


def test_later_calibrations_replace_earlier_ones():
    calibration.save(ONE)
    calibration.save(replace(ONE, risk=0.01, thresholds={6: 0.9}))
    assert calibration.load("ab12", "max_prob") == {6: 0.9}


def test_fingerprints_that_are_no_file_names():
    for odd in ("../../escape", "a/b", "", "ü" * 200):
        path = calibration.save(replace(ONE, fingerprint=odd))
        assert path.parent == calibration.folder()
        assert calibration.load(odd, "max_prob") == ONE.thresholds


def test_thresholds_at_exits_that_the_model_is_not_open_with():
    calibration.save(ONE)
    assert calibration.load("ab12", "max_prob", exits=(2, 4)) == ONE.thresholds
    with pytest.warns(UserWarning, match="not used"):
        assert calibration.load("ab12", "max_prob", exits=(2, 6)) is None


def damaged() -> dict[str, bytes]:
    good = ONE.as_json()
    return {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in {
        "empty": b"", "binary": bytes(range(256)), "cut": json.dumps(good).encode()[:40], "number": 3, "null": None,
        "nested": b"[" * 100_000, "list of others": [1, 2], "later format": {**good, "format": 2},
        "no thresholds": {k: v for k, v in good.items() if k != "thresholds"},
        "threshold 1": {**good, "thresholds": {"2": 1}}, "threshold 0": {**good, "thresholds": {"2": 0.0}},
        "threshold text": {**good, "thresholds": {"2": "0.5"}}, "threshold true": {**good, "thresholds": {"2": True}},
        "no such exit": {**good, "thresholds": {"3": 0.5}}, "layer text": {**good, "thresholds": {"two": 0.5}},
        "layer squared": {**good, "thresholds": {"\u00b2": 0.5}},
        "layer long": {**good, "thresholds": {"9" * 5000: 0.5}},
        "exit too high": {**good, "exit_layers": [2, 8]}, "exits text": {**good, "exit_layers": "2,4"},
        "criterion": {**good, "criterion": "luck"}, "way": {**good, "missing_kv": "verify"},
        "nan": json.dumps({**good, "risk": float("nan")}).encode(), "tokens": {**good, "tokens": 1.5},
    }.items()}


@pytest.mark.parametrize("name", damaged())
def test_damaged_files_are_typed_errors_when_read_and_warnings_when_looked_up(name):
    path = calibration_store.path_of("ab12", "max_prob")
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged()[name])
    with pytest.raises(CalibrationError, match=path.name):
        calibration.read(path)
    with pytest.warns(UserWarning, match="not used"):
        assert calibration.load("ab12", "max_prob") is None


def test_bytes_changed_at_random_never_crash():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    path = calibration.save(ONE)
    raw = path.read_bytes()
    for _ in range(300):
        bad = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bytes(bad[:rng.randint(0, len(bad))]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = calibration.load("ab12", "max_prob")
        assert found is None or all(0 < limit < 1 for limit in found.values())


def test_another_models_file_is_no_answer():
    path = calibration_store.path_of("ab12", "max_prob")
    calibration.save(replace(ONE, fingerprint="other"), path)
    assert calibration.load("ab12", "max_prob") is None


def test_a_folder_in_the_files_place():
    calibration_store.path_of("ab12", "max_prob").mkdir(parents=True)
    assert calibration.load("ab12", "max_prob") is None
    with pytest.raises(OSError):
        calibration.save(ONE)


def test_a_full_disk_leaves_the_old_file(monkeypatch):
    path = calibration.save(ONE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration_store.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        calibration.save(replace(ONE, thresholds={2: 0.9}))
    monkeypatch.undo()
    assert calibration.read(path) == [ONE] and len(list(path.parent.iterdir())) == 1


def test_shipped_calibrations_come_after_the_users(monkeypatch, tmp_path):
    shipped = tmp_path / "calibration.json"
    calibration_store.write_json(shipped, [ONE.as_json(), replace(ONE, criterion="margin").as_json()])
    monkeypatch.setattr(calibration_store, "_shipped", lambda: iter([Path(shipped)]))
    assert calibration.load("ab12", "margin") == ONE.thresholds
    calibration.save(replace(ONE, criterion="margin", thresholds={6: 0.5}))
    assert calibration.load("ab12", "margin") == {6: 0.5}
    assert calibration.load("ab12", "max_prob") == ONE.thresholds
