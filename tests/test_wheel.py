"""The wheel: what it holds, and that it runs in an environment where there is nothing else."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_architecture import ROOMS, ROOT

DATA_SUFFIXES = (".gguf", ".md", ".json", ".typed", ".html", ".css", ".js", ".svg", ".txt", ".csv")
SERVER_EXTRA = ("starlette", "uvicorn", "orjson")  # of modules that only apps with the extra `server` import
OFFLINE = ("Temporary failure in name resolution", "Failed to establish a new connection", "Network is unreachable",
           "Name or service not known", "getaddrinfo failed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that no earlier build's leftovers get in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.part"))
        else:
            shutil.copy(path, source / name)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), "."],
        cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(out.glob("edge_runtime-*.whl"))


def expected_files() -> set[str]:
    """Every module and data file of the rooms, under its path in the wheel."""
    found = set()
    for folder, name in ROOMS.items():
        for file in (ROOT / folder).rglob("*"):
            if file.suffix == ".py" or file.suffix in DATA_SUFFIXES:
                found.add(f"{name.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}")
    return found


def test_wheel_holds_one_package_with_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in names - metadata} == {"edge_runtime"}
    assert names - metadata == expected_files()
    assert any(name.startswith("edge_runtime/models/bundled/") and name.endswith(".gguf") for name in names)
    assert "edge_runtime/py.typed" in names
    assert any(name.endswith("LICENSE") for name in metadata)


def test_wheel_is_small_enough_to_carry_its_model(wheel):
    model = [i for i in zipfile.ZipFile(wheel).infolist() if i.filename.endswith(".gguf")]
    assert [i.file_size < 10_000_000 for i in model] == [True]
    assert wheel.stat().st_size < 12_000_000


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    done = subprocess.run([str(scripts / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                           str(wheel)], capture_output=True, text=True)
    if done.returncode and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == 0, done.stderr
    return scripts


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EDGE_RUNTIME_ISA"))}


def test_installed_wheel_runs_the_doctor(environment, tmp_path):
    done = subprocess.run([str(environment / "edge-runtime"), "doctor", "--json"], cwd=tmp_path, env=clean(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    facts = json.loads(done.stdout)
    assert facts["problems"] == []
    assert facts["isa"]["chosen"] in facts["isa"]["available"]
    assert facts["memory"]["bandwidth"] > 1e8
    assert Path(facts["bundled_model"]["path"]).is_relative_to(environment.parent)
    missing = {extra["name"]: extra["mend"] for extra in facts["extras"] if extra["missing"]}
    assert missing["distill"] == "pip install 'edge-runtime[distill]'"


def test_installed_wheel_imports_every_module_but_the_recipes(environment, tmp_path):
    names = sorted(name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
                   for name in expected_files() if name.endswith(".py") and "/recipes/" not in name
                   and "worker" not in name)
    code = (f"import importlib\nfor name in {names!r}:\n  try: importlib.import_module(name)\n"
            f"  except ModuleNotFoundError as error:\n    if error.name.split('.')[0] not in {SERVER_EXTRA!r}: raise")
    done = subprocess.run([str(environment / "python"), "-c", code], cwd=tmp_path, env=clean(), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_installed_wheel_answers_with_its_own_model(environment, tmp_path):
    done = subprocess.run([str(environment / "edge-runtime"), "run", "-n", "8", "--temperature", "0", "Hello"],
                          cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
