#!/usr/bin/env bash
# mypy on the built wheel, installed with its dependencies into a venv of its own, from outside the checkout.
# usage: PYTHON=.venv/bin/python scripts/types.sh   (PYTHON has mypy and pip; the venv is kept in .venv-types)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
case $python in /*) ;; */*) python=$root/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$work" .
[ -x .venv-types/bin/python ] || "$python" -m venv .venv-types
.venv-types/bin/python -m pip install -q --disable-pip-version-check "$work"/edge_runtime-*.whl
.venv-types/bin/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps "$work"/edge_runtime-*.whl
cd "$work"
"$python" -m mypy --config-file "$root/pyproject.toml" --python-executable "$root/.venv-types/bin/python" \
  --cache-dir "$root/.mypy_cache" -p edge_runtime
