# make demo    the sample, step by step        make check     everything a change must pass
# make test    the tests                       make format    rewrite the code's layout
# Both create .venv on first use and keep it until pyproject.toml or constraints.txt change.

PYTHON ?= python3
TORCH ?= 2.13.0
JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
LOWEST := .venv-lowest
LOWEST_READY := $(LOWEST)/.ready-torch-$(TORCH)

CODE := convert modeling_mtt
# One thread per process: $(JOBS) processes share the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST_FLAGS := -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo docs oracles test test-lowest test-transformers check format format-check lint types clean

help:
	@echo "make demo         convert the sample checkpoint and generate from it"
	@echo "make test         run the tests"
	@echo "make docs         build the pages of docs/ into build/docs"
	@echo "make check        format check, lint, types, docs, tests"
	@echo "make format       format the code and sort its imports"
	@echo "make lint         ruff"
	@echo "make types        mypy"
	@echo "make oracles      compare MTT's options with other classes again; see docs/oracles.md"
	@echo "make test-lowest  run the tests with the lowest supported versions [TORCH=2.11.0]"
	@echo "make test-transformers  run transformers' own tests [FAST=1]; see docs/transformers-tests.md"
	@echo "make clean        remove the environments, caches and build products"
	@echo "PYTHON=python3.12 chooses the interpreter, PYTEST_ARGS='-k plan' what to run."

demo: $(READY)
	$(VENV)/bin/mtt demo

test: $(READY)
	$(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

docs: $(READY)
	$(VENV)/bin/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

oracles: $(READY)
	$(PYTEST) $(VENV)/bin/python -m tests.modeling_mtt.oracles

check:
	@$(MAKE) --no-print-directory format-check
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory test

format: $(READY)
	$(VENV)/bin/ruff check --select I --fix --quiet .
	$(VENV)/bin/ruff format .

format-check: $(READY)
	$(VENV)/bin/ruff format --check --diff .

lint: $(READY)
	$(VENV)/bin/ruff check .

types: $(READY)
	$(VENV)/bin/mypy $(CODE)

test-lowest: $(LOWEST_READY)
	$(PYTEST) $(LOWEST)/bin/python -m pytest $(PYTEST_FLAGS)

test-transformers: $(READY)
	$(VENV)/bin/python tests/transformers_suite/run.py --jobs $(JOBS) $(if $(FAST),--fast)

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# $(call install,FOLDER,ARGUMENTS): a virtual environment with the project in it, editable.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: mtt needs Python 3.11 or newer"; \
	    echo "  found:    $(PYTHON): $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	    echo "  expected: Python >= 3.11"; \
	    echo "  fix:      name one, e.g. make $(MAKECMDGOALS) PYTHON=python3.12"; \
	    exit 1; } >&2
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet $(2) --editable '.[test,docs,megatron]'
	@touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(call install,$(VENV),--constraint constraints.txt)

$(LOWEST_READY): pyproject.toml constraints-lowest.txt
	$(call install,$(LOWEST),--constraint constraints-lowest.txt 'torch==$(TORCH)')
