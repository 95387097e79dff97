# Everything runs from a fresh clone: the first target that needs it makes .venv and installs into it.
#   PYTHON=/path/to/python make test   uses that interpreter: no .venv is made, nothing is installed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

EXTRAS := test,benchmarks,plot,cli,docs

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := .venv/bin/python
READY := .venv/.installed
endif

# mamba-ssm finds torch at build time only without isolation, and compiles CUDA code unless told not
# to. Nothing but its own tests needs it, so a machine that can't build it gets a warning.
define MAMBA_SSM
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt \
	  setuptools wheel ninja packaging einops
MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv/bin/python -m pip install \
	  --disable-pip-version-check --no-build-isolation -c constraints.txt mamba-ssm \
	  || printf '%s\n' 'WARNING: mamba-ssm could not be installed (see above): its tests will be skipped.' \
	  'To try again: rm .venv/.installed; make install' >&2
endef

# On a CI machine `make test` leaves nothing out.
MARKS := $(if $(filter true 1,$(CI)),,-m "not slow")
# Two workers keep two cores busy while tests wait for processes that they have started. A file stays
# in one worker, since tests of one file share what is expensive to set up.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile
ARGS ?=

# The oldest versions in environments of their own. PyPI has torch 2.4.1 with CUDA alone: 5 GB.
OLD_PYTHON ?= $(shell python3.10 -c "" 2>/dev/null && echo python3.10 || echo python3)
OLD := .venv-oldest
OLD_FULL := .venv-oldest-full
CORE := $(filter-out tests/callbacks tests/benchmarks,$(patsubst %/,%,$(wildcard tests/*/))) \
	tests/test_compressor.py tests/test_precision.py tests/test_regularizer.py tests/test_rules.py

.PHONY: help install demo speed test test-all test-oldest test-oldest-full lint format docs table
.PHONY: test-other-name gpu dist clean distclean

help:  ## Show the targets
	@echo "make TARGET [PYTHON=/path/to/python] [ARGS=\"more arguments\"]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -e ".[$(EXTRAS)]" -c constraints.txt
	$(MAMBA_SSM)
	touch $@

install: $(READY)  ## Make .venv with everything that tests, docs and demo need

demo: $(READY)  ## Train on delayed recall and digits: full, compressed and small; print the table
	$(PY) -m benchmarks.demo $(ARGS)

speed: $(READY)  ## Measure all figures about speed and memory (ARGS="--suite quick" for a look)
	$(PY) -m benchmarks.speed $(ARGS)

test: $(READY)  ## Unit tests and doctests (CI=true: the slow ones as well)
	$(PY) $(PYTEST) $(MARKS) $(ARGS)

test-all: $(READY)  ## All tests, the slow ones included
	$(PY) $(PYTEST) $(ARGS)

$(OLD)/.installed: requirements-oldest.txt
	test -x $(OLD)/bin/python || python3 -m venv $(OLD)
	.ci/cpu-torch $(OLD)/bin/python 2.13.0
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt
	touch $@

$(OLD_FULL)/.installed: requirements-oldest.txt
	test -x $(OLD_FULL)/bin/python || $(OLD_PYTHON) -m venv $(OLD_FULL)
	$(OLD_FULL)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.4.1 "numpy<2" \
	  -r requirements-oldest.txt
	touch $@

test-oldest: $(OLD)/.installed  ## The callback's tests with Lightning 2.4.0 under both its names
	$(OLD)/bin/python $(PYTEST) -m "not slow" tests/callbacks --ignore tests/callbacks/matrix $(ARGS)

test-oldest-full: $(OLD_FULL)/.installed  ## Core tests with torch 2.4.1, numpy 1 (5 GB)
	$(OLD_FULL)/bin/python $(PYTEST) -m "not slow" $(CORE) tests/callbacks/test_names.py $(ARGS)

# All tests import `lightning`; this folder lets that be `pytorch_lightning`, in every process.
test-other-name: $(READY)  ## The callback's tests, the DDP matrix included, under pytorch_lightning
	PYTHONPATH=$(CURDIR)/tests/other_name $(PY) $(PYTEST) tests/callbacks --ignore tests/callbacks/test_names.py $(ARGS)

dist:  ## Build sdist and wheel into dist/; try the wheel with and without Lightning
	.ci/dist $(firstword $(PYTHON) python3)

gpu: $(READY)  ## What a machine with a CUDA device has to show (ARGS=--dry-run on a CPU)
	$(PY) -m benchmarks.gpu $(ARGS)

lint: $(READY)  ## Check format, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY)  ## Format the code and apply the safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY)  ## Build the site into docs/_build/html; a warning is an error
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

table: $(READY)  ## Write the generated tables into README and docs
	$(PY) -m docs.table

clean:  ## Remove what builds, tests and runs leave behind (not .venv)
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf *.egg-info lightning_logs checkpoints
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments
	rm -rf .venv $(OLD) $(OLD_FULL)
