# make run: set up and do the main job on the bundled model. make test: set up and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT := out
TORCH ?= torch==2.13.0

.PHONY: run test test-peers test-browser test-accelerators test-ray lint types docs bench clean

run: $(STAMP)-run
	@mkdir -p $(OUT)
	$(BIN)/edge-runtime summarize examples --out $(OUT)/summaries.jsonl --show --fresh

test: $(STAMP)-test $(STAMP)-test-apps
	$(BIN)/python -m pytest --ignore=tests/peers --ignore=tests/browser --ignore=tests/ray -m "not accelerators"

# Parity with llama-cpp-python (an sdist: 6-7 minutes to compile the first time) and transformers; training, which needs
# torch too.
test-peers: $(STAMP)-test $(STAMP)-peers
	$(BIN)/python -m pytest -m peers tests/peers
	$(BIN)/python -m pytest tests/models tests/edge_runtime/test_distillation.py tests/test_cli_distill.py -k "recipes or distill"

# The chat's page in a real browser: Debian's chromium, or the one that CHROMIUM names. Pictures go to out/screenshots.
test-browser: $(STAMP)-test $(STAMP)-browser
	$(BIN)/python -m pytest -m browser --timeout 300 tests/browser

# The summarizer on a local Ray cluster of two workers.
test-ray: $(STAMP)-test $(STAMP)-ray
	$(BIN)/python -m pytest -m ray tests/ray

# ONNX Runtime's plugins without an accelerator: WebGPU on Chromium's software Vulkan, OpenVINO's CPU device.
test-accelerators: $(STAMP)-test $(STAMP)-webgpu $(STAMP)-openvino
	$(BIN)/python -m pytest -m accelerators tests/devices/test_onnx_accelerators.py

lint: $(STAMP)-lint
	$(BIN)/ruff check .

# Type checkers do not follow the editable install's hook: they see the built wheel, from outside the checkout.
types: $(STAMP)-lint
	PYTHON=$(BIN)/python bash scripts/types.sh

# The site, as readers see it: build/site/index.html
docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)-bench
	$(BIN)/python benchmarks/cpu_engine.py --quick

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Edge Runtime needs Python 3.10 or newer, this is " + sys.version.split()[0] + \
	  ": make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(STAMP)-run: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	@touch $@

$(STAMP)-peers: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[peers]'
	@touch $@

$(STAMP)-%: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-types $(OUT) build dist *.egg-info
