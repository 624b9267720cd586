# make demo    set up .venv, train on scikit-learn's digits, write runs/demo/report.html
# make test    set up .venv, run the tests
# make help    everything else
#
# Variables:   make test PYTHON=python3.12 VENV=../venv       another interpreter, another place
#              make test TORCH=torch                            the newest torch (or 'torch==2.11.0', or a wheel's path)
#              make test VENV_FLAGS=--system-site-packages      use the torch that the system has (clusters, containers)

PYTHON     ?= python3
VENV       ?= .venv
VENV_FLAGS ?=
TORCH      ?= $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
WORKERS    ?= auto
ARGS       ?=

PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check
PINS := $(VENV)/.pins.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format typecheck imports check bench example clean

help:  ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(VENV)/.cli  ## what sparsity saves and when flatness pays, on digits; report in runs/demo/report.html
	$(VENV)/bin/s2sam demo $(ARGS)

test: $(VENV)/.dev  ## run the tests and every example in a docstring
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --maxprocesses 8 $(ARGS)

lint: $(VENV)/.dev  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.dev  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(VENV)/.dev  ## mypy, strict on the core
	$(PY) -m mypy

imports: $(VENV)/.dev  ## import-linter: who may import whom
	$(VENV)/bin/lint-imports

check: lint typecheck imports  ## all three

bench: $(VENV)/.cli  ## measure what a step costs (minutes; leave the machine alone meanwhile)
	$(PY) benchmarks/step_overhead.py $(ARGS)

example: $(VENV)/.cli  ## run examples/minimal.py
	$(PY) examples/minimal.py

clean:  ## remove the virtual environment and every cache; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------- set-up: one stamp per stage
# torch first and alone, so that `TORCH=` decides and no later install replaces it; the pins name the torch found.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@sed '/^torch==/d' constraints.txt > $(PINS)
	$(PY) -c 'import torch, numpy' 2>/dev/null || $(PIP) install -q -c $(PINS) '$(TORCH)' numpy
	touch $@

$(PINS): $(VENV)/.torch constraints.txt
	@sed '/^torch==/d' constraints.txt > $@
	@$(PY) -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' >> $@

$(VENV)/.cli: $(PINS) pyproject.toml
	$(PIP) install -q -c $(PINS) -e '.[cli]'
	touch $@

$(VENV)/.dev: $(VENV)/.cli
	$(PIP) install -q -c $(PINS) -e '.[cli,dev]'
	touch $@
