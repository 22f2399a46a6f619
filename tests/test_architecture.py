"""The order of the rooms: who imports whom, read from the sources, and what importing a low room pulls in."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder -> import name, as pyproject.toml maps them.
ROOMS = {"edge_runtime": "edge_runtime", "quant": "edge_runtime.quant", "models": "edge_runtime.models",
         "offload": "edge_runtime.offload", "apps": "edge_runtime.apps"}
# Floors, the longest matching name decides; modules of one floor may import each other.
FLOORS = {
    "edge_runtime.errors": 0, "edge_runtime.kernels": 1, "edge_runtime.quant": 2, "edge_runtime.models": 3,
    "edge_runtime.devices": 4, "edge_runtime.offload": 5, "edge_runtime": 6, "edge_runtime.apps": 7,
    "edge_runtime.cli": 8,
}
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "openvino", "llama_cpp")


def modules() -> dict[str, Path]:
    """Import name -> file, of everything that is installed."""
    found = {}
    for folder, name in ROOMS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = list(file.relative_to(ROOT / folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([name, *parts])] = file
    return found


def floor(module: str) -> int:
    if re.fullmatch(r"edge_runtime\.cli(_\w+)?", module):
        return FLOORS["edge_runtime.cli"]
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def imported(name: str, file: Path, known: set[str], top_level_only: bool = False) -> set[str]:
    """Modules of this package that a file names in imports, inside functions too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[:len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


def test_rooms_import_only_downward():
    known = modules()
    assert len(known) > 60
    wrong = []
    for name, file in sorted(known.items()):
        for other in imported(name, file, set(known)):
            if (other == "edge_runtime" or other.startswith("edge_runtime.")) and floor(other) > floor(name):
                # The package itself holds only its version and names that load on first use.
                if other == "edge_runtime":
                    continue
                wrong.append(f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})")
    assert not wrong, "\n".join(wrong)


def test_imports_name_modules_that_exist():
    known = modules()
    wrong = []
    for name, file in sorted(known.items()):
        for other in imported(name, file, set(known)):
            if other.startswith("edge_runtime.") and other not in known:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_never_imported_at_import_time():
    known = modules()
    wrong = []
    for name, file in sorted(known.items()):
        if name.startswith("edge_runtime.models.recipes"):
            continue  # the extra `distill` is for them
        for other in imported(name, file, set(known), top_level_only=True):
            if other.split(".")[0] in HEAVY and "worker" not in name:
                wrong.append(f"{name} imports {other} at import time")
    assert not wrong, "\n".join(wrong)


def test_one_place_sets_the_log_callback_of_llama_cpp():
    """llama.cpp holds only its address: one freed by Python ended whole test runs with a segmentation fault."""
    files = [*modules().values(), *(ROOT / "tests" / "peers").rglob("*.py")]
    setters = {file.name for file in files if "llama_log_set(" in file.read_text(encoding="utf-8")}
    assert setters == {"llama_cpp_bindings.py"}


def test_errors_import_nothing_of_ours():
    known = modules()
    file = known["edge_runtime.errors"]
    assert not {m for m in imported("edge_runtime.errors", file, set(known)) if m.startswith("edge_runtime")}


@pytest.mark.parametrize("room, allowed", [
    ("edge_runtime.kernels.matmul_tiles", {"errors", "kernels"}),
    ("edge_runtime.quant.quantize", {"errors", "kernels", "quant"}),
    ("edge_runtime.models.gguf_file", {"errors", "kernels", "quant", "models"}),
    ("edge_runtime.offload.plan", {"errors", "kernels", "quant", "models", "devices", "offload"}),
])
def test_importing_a_low_room_loads_nothing_above_it(room, allowed):
    code = (f"import sys, {room}\n"
            "print(*sorted(m for m in sys.modules if m.startswith('edge_runtime.') or m in "
            f"{HEAVY!r}))")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    outside = [m for m in loaded if m in HEAVY or m.split(".")[1] not in allowed]
    assert not outside


def test_the_package_itself_is_light():
    code = ("import sys, edge_runtime, edge_runtime.cli\n"
            "print(*(m for m in ('numba', 'numpy', 'torch') if m in sys.modules))")
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
