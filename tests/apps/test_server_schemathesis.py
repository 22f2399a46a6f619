"""Schemathesis over the server's own OpenAPI page: what it calls valid, malformed and an answer is so."""
from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("schemathesis")
pytest.importorskip("uvicorn")

from edge_runtime.apps.model_host import ModelHost
from tests.apps.servers import echo_llm, serving
from tests.edge_runtime.llms import settled

# A valid body may still be refused: parameters exclude each other, and prompts are longer than the context.
UNCHECKED = "positive_data_acceptance"


@pytest.mark.parametrize("phase, examples", [("fuzzing", "12")])
def test_the_page_is_true(tmp_path, phase, examples):
    llm = echo_llm(context=128, end_every=4)
    with serving(ModelHost.of(llm, "echo")) as url:
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--phases", phase, "--no-color",
             "--max-examples", examples, "--exclude-checks", UNCHECKED, "--continue-on-failure", "--seed", "7",
             "--suppress-health-check", "all"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "Tested: 10" in done.stdout
        settled(llm)
