# The chores of the house. `make help` lists them; each is a line or two, so that nothing is hidden here.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
# Kernels are compiled and demo weights fetched where the code for it exists; both are cached outside the tree.
KERNELS := $(wildcard src/distserve/engine/kernels/*.[ch] src/distserve/engine/kernels/*.py src/distserve/transfer/copying.* src/distserve/native.py)
# What the simulator is made of, compiled for speed; nothing needs it to be (src/distserve/compiled.py).
SIMULATOR := $(wildcard src/distserve/*.py src/distserve/sched/*.py src/distserve/costs/*.py src/distserve/sim/*.py)
HUB := $(wildcard src/distserve/engine/hub.py)
PEER := $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup ready demo test check format bench paper docs clean

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1|/' | \
	  while IFS='|' read -r name what; do printf '  make %-8s %s\n' "$$name" "$$what"; done

setup: ready $(VENV)/.compiled ## make .venv with pinned dependencies, compile kernels and simulator, fetch the demo model

ready: $(VENV)/.installed $(VENV)/.kernels $(VENV)/.weights

demo: ready ## set up if needed and serve the demo model, prefill and decode apart (PORT=8000); Ctrl-C stops it
	@exec $(BIN)/distserve serve --port $(PORT)

test: setup ## run the tests (about ten minutes on two cores; no GPU, no network)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed ## lint, format check and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## every benchmark; VLLM_PYTHON=path/to/python adds vLLM's column (docs/measurements.md tells how to get one)
	$(BIN)/python -m benchmarks.engine $(PEER)
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.handoff
	$(BIN)/python -m benchmarks.memory $(PEER)
	$(BIN)/python -m benchmarks.startup $(PEER)
	$(BIN)/python -m benchmarks.simulator
	$(BIN)/python -m benchmarks.search
	$(BIN)/python -m benchmarks.resharding
	$(BIN)/python -m benchmarks.ranks
	$(BIN)/python -m benchmarks.nixl
	$(BIN)/python -m benchmarks.roofline
	$(BIN)/python -m benchmarks.weather
	$(BIN)/python -m benchmarks.awake
	$(BIN)/python -m benchmarks.client
	$(BIN)/python -m benchmarks.recording

paper: $(VENV)/.installed ## the paper's figures and tables, simulated beside its numbers: docs/guides/paper.md (minutes)
	$(BIN)/python -m experiments $(ARGS)

accuracy: $(VENV)/.installed ## simulate the real A100 runs again: docs/accuracy.md and its plots (a minute)
	$(BIN)/python -m experiments.accuracy

docs: ## check that links between the documents, and to files of the tree, resolve
	$(BIN)/python -m pytest -q tests/test_repository.py

clean: ## remove what the commands above made (.venv too)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/out build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "distserve needs Python 3.11 or newer; name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots]'
	@touch $@

$(VENV)/.kernels: $(VENV)/.installed $(KERNELS)
	@test -z "$(KERNELS)" || $(BIN)/python -m distserve.engine.kernels
	@test -z "$(KERNELS)" || $(BIN)/python -m distserve.transfer.copying
	@touch $@

$(VENV)/.compiled: $(VENV)/.installed $(SIMULATOR)
	@$(BIN)/python -m distserve.precompile && touch $@

$(VENV)/.weights: $(VENV)/.installed $(HUB)
	@test -z "$(HUB)" || $(BIN)/python -m distserve.engine.hub demo
	@touch $@
