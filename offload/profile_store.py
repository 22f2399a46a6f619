"""Profiles on disk: a JSON file per model, device and setting, in the cache folder, with what each was measured on."""
from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from edge_runtime.errors import ProfileError
from edge_runtime.kernels.compile import cache_folder
from edge_runtime.offload.curves import Curves

FORMAT = 1
LARGEST = 16 << 20  # bytes of a file: ours have some thousands


@dataclass(frozen=True)
class Setting:
    """What a profile is for. model: fingerprint of its file. device: as in LLM(device=...). precision: of the device's
    products. kv: type of the host's pages. device_threads, host_threads; device_cores, host_cores: processors they are
    pinned to, empty: none."""

    model: str
    device: str
    precision: str
    kv: str
    device_threads: int
    host_threads: int
    device_cores: tuple[int, ...] = ()
    host_cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Profile:
    """Curves with where they come from. machine: facts of machine and software by name, on any change of which a
    profile is measured anew. seconds: that measuring took. notes: what was extrapolated, and why. date: ISO 8601.
    reach: as of `profiler.reach` when it was measured, empty where that is not known."""

    setting: Setting
    machine: dict[str, str]
    curves: Curves
    seconds: float
    notes: tuple[str, ...]
    date: str
    reach: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of setting and machine, 16 hex digits."""
        words = json.dumps([asdict(self.setting), self.machine], sort_keys=True)
        return blake2b(words.encode(), digest_size=8).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "fingerprint": self.fingerprint, "date": self.date, "seconds": self.seconds,
                "setting": asdict(self.setting), "machine": self.machine, "notes": list(self.notes),
                "reach": list(self.reach), "curves": self.curves.as_json()}

    @classmethod
    def from_json(cls, value: Any, where: object) -> Profile:
        """Checked field by field. Raises ProfileError, which names `where`."""
        if not isinstance(value, Mapping):
            raise ProfileError(where, "not a profile: a JSON object is expected")
        if value.get("format") != FORMAT:
            raise ProfileError(where, f"format {value.get('format')!r} is not {FORMAT}")
        machine, notes, seconds = value.get("machine"), value.get("notes"), value.get("seconds")
        if not isinstance(machine, Mapping) or not all(isinstance(x, str) for pair in machine.items() for x in pair):
            raise ProfileError(where, "the facts of the machine are missing or no words")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ProfileError(where, f"notes {str(notes)[:40]!r} are no list of words")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
            raise ProfileError(where, f"seconds {str(seconds)[:40]!r} are no time")
        reach = value.get("reach", [])
        if not isinstance(reach, list) or not all(type(tokens) is int and tokens >= 0 for tokens in reach):
            raise ProfileError(where, f"reach {str(reach)[:40]!r} is no list of numbers of tokens")
        try:
            curves = Curves.from_json(value.get("curves"))
        except ProfileError as error:
            raise ProfileError(where, f"{error.subject}: {error.reason}") from None
        found = cls(_setting(value.get("setting"), where), dict(machine), curves, float(seconds), tuple(notes),
                    str(value.get("date", "")), tuple(reach))
        if value.get("fingerprint") != found.fingerprint:
            raise ProfileError(where, f"its fingerprint {str(value.get('fingerprint'))[:40]!r} is not that of its "
                                      f"setting and machine, {found.fingerprint}")
        return found


def folder() -> Path:
    """Beside the compiled kernels: $EDGE_RUNTIME_CACHE, or the platform's cache folder."""
    return cache_folder().with_name("profiles")


def path_of(setting: Setting) -> Path:
    """The file of a profile; it may not exist. The machine is not part of the name: a change of it is noticed, and the
    file replaced."""
    digest = blake2b(json.dumps(asdict(setting), sort_keys=True).encode(), digest_size=8).hexdigest()
    return folder() / f"{re.sub('[^0-9A-Za-z]+', '-', setting.device)}-{digest}.json"


def save(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile where `find` finds it, or to `path`. The old file stays whole until the new one is. OSError where
    it cannot be written."""
    path = path or path_of(profile.setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(profile.as_json(), file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    return path


def read(path: Path) -> Profile:
    """Raises ProfileError (not a profile, or a broken one), and OSError where it cannot be opened."""
    if path.stat().st_size > LARGEST:
        raise ProfileError(path, f"{path.stat().st_size:,} bytes are too many for a profile")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProfileError(path, f"not JSON: {str(error)[:120]}") from None
    return Profile.from_json(value, path)


def check(profile: Profile, setting: Setting, machine: Mapping[str, str], where: object) -> Profile:
    """Itself, or ProfileError that names what it was measured for or on instead."""
    for name, wanted in asdict(setting).items():
        if getattr(profile.setting, name) != wanted:
            raise ProfileError(where, f"measured for {name}={getattr(profile.setting, name)!r}, not {wanted!r}")
    for name in sorted({*machine, *profile.machine}):
        was, now = profile.machine.get(name, "unknown"), machine.get(name, "unknown")
        if was != now:
            raise ProfileError(where, f"measured where {name} was {was}, here it is {now}")
    return profile


def find(setting: Setting, machine: Mapping[str, str]) -> Profile | None:
    """The stored profile of a setting on this machine, None where there is none. One that cannot be used, since it is
    broken or from another machine, is warned of and passed over."""
    path = path_of(setting)
    try:
        if not path.is_file():
            return None
        return check(read(path), setting, machine, path)
    except ProfileError as error:
        warnings.warn(f"{path}: {error.reason}: the profile is measured anew", stacklevel=2)
    except OSError as error:
        warnings.warn(f"{path}: {error.strerror or error}: the profile is measured anew", stacklevel=2)
    return None


def _setting(value: Any, where: object) -> Setting:
    if not isinstance(value, Mapping):
        raise ProfileError(where, "the setting is missing")
    found: dict[str, Any] = {}
    for name, kind in Setting.__annotations__.items():
        given = value.get(name)
        if kind.startswith("tuple") and isinstance(given, list) and all(type(core) is int for core in given):
            given = tuple(given)
        right = isinstance(given, {"str": str, "int": int}.get(kind, tuple)) and not isinstance(given, bool)
        if not right:
            raise ProfileError(where, f"setting {name}={str(given)[:40]} is not {kind}")
        found[name] = given
    return Setting(**found)
