# Darkroom's verbs: `make` lists them. The two that matter first, `make demo` and `make test`, make
# the environment when it is missing, so each is one command on a fresh machine.

BIN := .venv/bin

# The first of these that runs and is new enough. 3.11 comes first because constraints.txt was
# frozen on it; any later one works: make PYTHON=/path/to/python3.13
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Tests and the demo use only what is in the tree: a look at the hub would be a mistake.
demo test faults acceptance gpu-test: export HF_HUB_OFFLINE := 1

# Quiet, but errors are shown: -qq drops pip's progress and its warnings.
PIP_INSTALL := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults acceptance exactness lint types fmt docs bench bench-queue eval train gpu-test clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/ready ## make the environment in .venv, with everything for development

demo: .venv/ready-to-run ## send the sample pictures through a service with the bundled model; ARGS=--check fails if one is wrong
	@$(BIN)/darkroom demo $(ARGS)

# All tests take three processes, for those of the service wait while those of the engine compute. The
# tests of a file stay together, as what they share is dear, and files begin in their order.
test: .venv/ready ## run every test that needs no GPU; ARGS="tests/engine -x" narrows it, to one process
	@$(BIN)/pytest -m "not gpu" $(or $(ARGS),-n 3 --dist loadfile --no-loadscope-reorder)

faults: .venv/ready ## kill workers and the broker under 5,000 items, then under 40 clips in parts, on each database; some minutes
	@DARKROOM_FAULT_PROFILE=full $(BIN)/pytest -s tests/faults/test_kills.py tests/faults/test_parts.py $(ARGS)

acceptance: .venv/ready ## 500 texts of the bundled model and 100,000 lines, both through a whole service; some minutes
	@DARKROOM_ACCEPTANCE_ITEMS=500 $(BIN)/pytest -s tests/acceptance/test_texts.py $(ARGS)
	@$(BIN)/python -m bench.queue --items 100000 --workers 4

exactness: .venv/ready ## 100 requests of each shape of each model family against transformers, in one call, shuffled and alone; some minutes
	@DARKROOM_TEST_FAMILY_REQUESTS=100 $(BIN)/pytest --timeout 3600 tests/engine/test_families.py tests/engine/test_later_qwen.py tests/engine/test_phi3_v.py tests/engine/test_exactness.py $(ARGS)

lint: .venv/ready ## format, lint rules and who may import whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo

types: .venv/ready ## mypy, strict
	@$(BIN)/mypy

fmt: .venv/ready ## format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

docs: .venv/ready ## write the tables of docs/ that are made of code
	@$(BIN)/python -m tests.docs.models_page

bench: .venv/ready ## benchmark the engine on this machine; ARGS="--help" lists the options
	@$(BIN)/python -m bench.engine $(ARGS)

bench-queue: .venv/ready ## benchmark jobs through the whole service, with an engine that answers at once
	@$(BIN)/python -m bench.queue $(ARGS)

eval: .venv/ready ## measure how often the bundled model is right
	@$(BIN)/python -m models.evaluate $(ARGS)

train: .venv/ready ## train the bundled model anew, in slices that go on where the last one ended
	@$(BIN)/python -m models.train.train --out runs/darkroom-tiny $(ARGS)

gpu-test: .venv/ready ## run the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-test: torch sees no CUDA device here")'
	@$(BIN)/pytest -m gpu $(ARGS)

clean: ## remove caches and built packages; .venv stays
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Two stamps, so that the demo need not wait for the tools of development.
#
# torch is installed first and alone: a resolver that may choose pulls the newest CUDA build, several
# gigabytes, even where the version pinned in constraints.txt is already at hand. Which build it is
# is the user's choice: make demo TORCH_ARGS="--index-url ..."
.venv/ready-to-run: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "Installing torch into .venv: the large one, a minute or more ..."
	@$(PIP_INSTALL) $(TORCH_ARGS) torch
	@echo "Installing Darkroom with its engine and its service ..."
	@$(PIP_INSTALL) -e ".[engine,service,video]"
	@touch $@

.venv/ready: .venv/ready-to-run
	@echo "Installing the tools for tests and checks ..."
	@$(PIP_INSTALL) -e ".[engine,service,video,dev]"
	@touch $@

.venv/bin/pip:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Darkroom needs Python 3.11 or later, and found $(or $(PYTHON),none). Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making .venv with $(PYTHON) ..."
	@# One that is there without pip keeps what is in it.
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m ensurepip >/dev/null && $(BIN)/python -m pip --version >/dev/null && \
		{ [ -x $(BIN)/pip ] || ln -s pip3 $(BIN)/pip; }; else $(PYTHON) -m venv --clear .venv; fi
