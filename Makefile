# `make demo` and `make test` each work as the first command on a fresh machine: they create .venv and install.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= outputs/demo
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-min conformance fuzz docs quality style clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install the package with everything the other commands need

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)  ## train on the built-in example, evaluate, draw what it sees (under 5 minutes on two cores)
	$(PY) scripts/demo.py --output_dir $(OUTPUT)

test: $(STAMP)  ## run every test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

test-fast: $(STAMP)  ## run the tests that take under two minutes together
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m 'not slow'

# Python 3.10, the oldest that pyproject.toml allows, where there is one.
MIN_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))

test-min:  ## run every test with the oldest versions that pyproject.toml allows, in .venv-min
	$(MAKE) test VENV=.venv-min PYTHON=$(MIN_PYTHON) CONSTRAINTS=constraints-min.txt EXTRAS=dev,torchvision

conformance: $(STAMP)  ## run transformers' own common tests on our classes; pip fetches them once
	OMP_NUM_THREADS=1 PYTHONPATH=tests/conformance:tests $(PY) -m pytest -n 2 -o addopts=-q -p transformers_suite \
	    tests/conformance/check_*.py

docs: $(STAMP)  ## build the documentation as a site into outputs/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

EXAMPLES ?= 1000
fuzz: $(STAMP)  ## try EXAMPLES damaged and invented inputs per reader and per property
	OMP_NUM_THREADS=1 EXAMPLES=$(EXAMPLES) $(PY) -m pytest -n 2 --hypothesis-profile=many tests/test_fuzz.py tests/test_properties.py

quality: $(STAMP)  ## check formatting, lint and types; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

style: $(STAMP)  ## fix formatting and what lint can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment, caches and outputs
	rm -rf $(VENV) .venv-min outputs build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
