"""Calibrated thresholds of early exit on disk: one small JSON file per model, criterion and way of closing the KV.

They lie in the user's data folder (`EDGE_RUNTIME_DATA` moves it). A package may bring some for its own model; the
user's come first.
"""
from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from edge_runtime.errors import CalibrationError, InvalidRequestError

FORMAT = 1
CALIBRATED_CRITERIA = ("max_prob", "margin", "entropy")
CALIBRATED_MISSING_KV = ("recompute", "propagate")  # the third, "verify", gives the full model's tokens anyway


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what is promised of them: with probability `confidence` over the draw of the calibration text,
    the expected share of a sequence's tokens that differ from the full model's is at most `risk`.

    fingerprint: of the model file (`loading.fingerprint`). thresholds: exit layer -> confidence from which a token
    leaves; exits that are not used are left out. exit_layers: all that were tried; trained: the file names them itself.
    layers: of the model; layers_per_token: mean layer at which tokens leave. measured_risk, measured_tokens: share of
    differing tokens, mean over the test's sequences and of all its tokens. sequences, documents, tokens: calibrated on,
    the tuning share included; tuning: sequences that only chose the candidates.
    """

    fingerprint: str
    model: str
    criterion: str
    missing_kv: str
    risk: float
    confidence: float
    thresholds: dict[int, float]
    exit_layers: tuple[int, ...]
    trained: bool
    layers: int
    layers_per_token: float
    measured_risk: float
    measured_tokens: float
    documents: int
    sequences: int
    tuning: int
    tokens: int
    seed: int
    date: str
    version: str
    text: str = ""

    @property
    def saved(self) -> float:
        """Share of the layers that tokens do not wait for."""
        return 1 - self.layers_per_token / self.layers

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["thresholds"] = {str(layer): limit for layer, limit in sorted(self.thresholds.items())}
        return {"format": FORMAT, **found, "exit_layers": list(self.exit_layers)}

    @classmethod
    def from_json(cls, value: Any, where: object) -> Calibration:
        """Checked field by field. Raises `CalibrationError`, which names `where`."""
        if not isinstance(value, Mapping):
            raise CalibrationError(where, "not a calibration: a JSON object is expected")
        if value.get("format") != FORMAT:
            raise CalibrationError(where, f"format {value.get('format')!r} is not {FORMAT}. Calibrate anew")
        fields = {}
        for name, kind in _KINDS.items():
            if not _is(value.get(name), kind):
                raise CalibrationError(where, f"{name}={value.get(name)!r} is not {kind}. Calibrate anew")
            fields[name] = value[name]
        layers = fields["layers"]
        if fields["criterion"] not in CALIBRATED_CRITERIA or fields["missing_kv"] not in CALIBRATED_MISSING_KV:
            raise CalibrationError(where, f"criterion {fields['criterion']!r} with {fields['missing_kv']!r} is unknown")
        exits = value.get("exit_layers")
        if not isinstance(exits, list) or not all(_is(e, "a whole number") and 1 <= e < layers for e in exits):
            raise CalibrationError(where, f"exit_layers={exits!r} are not layers of {layers}")
        limits = value.get("thresholds")
        if not isinstance(limits, Mapping):
            raise CalibrationError(where, "thresholds are missing. Calibrate anew")
        thresholds = {}
        for key, limit in limits.items():
            if not (key in map(str, exits) and _is(limit, "a number") and 0 < limit < 1):
                raise CalibrationError(where, f"threshold {limit!r} at layer {key!r}: must lie between 0 and 1, at one "
                                              f"of the exits {exits}")
            thresholds[int(key)] = float(limit)
        return cls(**fields, thresholds=dict(sorted(thresholds.items())), exit_layers=tuple(exits))


_KINDS = {
    "fingerprint": "text", "model": "text", "criterion": "text", "missing_kv": "text", "date": "text",
    "version": "text", "text": "text", "risk": "a number", "confidence": "a number", "layers_per_token": "a number",
    "measured_risk": "a number", "measured_tokens": "a number", "trained": "true or false", "layers": "a whole number",
    "documents": "a whole number", "sequences": "a whole number", "tuning": "a whole number",
    "tokens": "a whole number", "seed": "a whole number"}


def _is(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "true or false":
        return isinstance(value, bool)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (kind == "a number" or isinstance(value, int))


def folder() -> Path:
    """Where calibrations are kept: $EDGE_RUNTIME_DATA, or the platform's folder for data of applications."""
    chosen = os.environ.get("EDGE_RUNTIME_DATA")
    if chosen:
        return Path(chosen) / "calibration"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "edge-runtime" / "calibration"


def path_of(fingerprint: str, criterion: str, missing_kv: str = "recompute") -> Path:
    """The file of one calibration; it may not exist."""
    name = fingerprint if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", fingerprint) else blake2b(
        fingerprint.encode(), digest_size=16).hexdigest()
    return folder() / f"{name}.{missing_kv}.{criterion}.json"


def save(calibration: Calibration, path: Path | None = None) -> Path:
    """Write a calibration where `find` finds it, or to `path`. The old file stays whole until the new one is.
    OSError where it cannot be written."""
    path = path or path_of(calibration.fingerprint, calibration.criterion, calibration.missing_kv)
    write_json(path, calibration.as_json())
    return path


def check_writable(path: Path) -> None:
    """Raise what `write_json` would raise of this path, before the work whose result it is to hold. OSError."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(part, 0o644)  # mkstemp's is the owner's alone, which a package's file must not be
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def read(path: Path) -> list[Calibration]:
    """The calibrations of a file: one, or a list of them. Raises `CalibrationError`, and OSError where it cannot be
    opened."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(path, f"not JSON: {str(error)[:120]}. Calibrate anew, or remove it") from None
    return [Calibration.from_json(one, path) for one in (value if isinstance(value, list) else [value])]


def find(fingerprint: str, criterion: str, missing_kv: str = "recompute") -> Calibration | None:
    """The user's calibration of a model, else the one that ships with it. A file that cannot be used is warned of and
    passed over."""
    wanted = (fingerprint, criterion, missing_kv)
    for path in (path_of(*wanted), *_shipped()):
        with _warned(path):
            if path.is_file():
                for found in read(path):
                    if (found.fingerprint, found.criterion, found.missing_kv) == wanted:
                        return found
    return None


def load(fingerprint: str, criterion: str, missing_kv: str = "recompute",
         exits: Sequence[int] | None = None) -> dict[int, float] | None:
    """Calibrated thresholds, exit layer -> confidence, or None where there are none.

    exits: the model's exits as opened; thresholds at other layers hold together or not at all, so that a calibration
    with exits beyond these is none.
    """
    if criterion not in CALIBRATED_CRITERIA:
        return None
    if missing_kv not in CALIBRATED_MISSING_KV:
        raise InvalidRequestError("missing_kv", missing_kv, " or ".join(CALIBRATED_MISSING_KV))
    found = find(fingerprint, criterion, missing_kv)
    if found is None:
        return None
    if exits is not None and not set(found.thresholds) <= set(exits):
        warnings.warn(f"the calibration of {found.model} has thresholds at layers {list(found.thresholds)}, and the "
                      f"model is open with exits at {list(exits)}: it is not used", stacklevel=2)
        return None
    return dict(found.thresholds)


def _shipped() -> Iterator[Path]:
    from edge_runtime.models import bundled

    yield Path(bundled.__file__).with_name("calibration.json")


@contextlib.contextmanager
def _warned(path: Path) -> Iterator[None]:
    try:
        yield
    except (CalibrationError, OSError) as error:
        warnings.warn(f"{error} (a calibration that is not used: {path})" if str(path) not in str(error) else
                      f"{error} It is not used.", stacklevel=4)
