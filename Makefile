# Every target sets up .venv itself, and again when the declared or the tried versions change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint types clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s  %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/demo.stamp  ## train and compare on the generated shop; the report is in runs/demo
	$(BIN)/taoemb demo --out runs/demo

test: $(VENV)/dev.stamp  ## run the test suite
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp  ## check types
	$(BIN)/mypy

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define install
@echo "Setting up $(VENV) with [$(EXTRAS)]; the first time takes a few minutes"
@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10 or newer: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
@$(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
@touch $@
endef

$(VENV)/demo.stamp: EXTRAS := demo,tracking
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(install)

$(VENV)/dev.stamp: EXTRAS := demo,data,tracking,dev
$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(install)
