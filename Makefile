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

.PHONY: help install demo speed test test-all gpu lint format docs table clean distclean

help:  ## Show the targets
	@echo "make TARGET [PYTHON=/path/to/python] [ARGS=\"more arguments\"]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -e ".[$(EXTRAS)]" -c constraints.txt
	$(MAMBA_SSM)
	touch $@

install: $(READY)  ## Make .venv with everything that tests, docs and demo need

demo: $(READY)  ## Train the digits classifier full, compressed and small; print the table
	$(PY) -m benchmarks.demo $(ARGS)

speed: $(READY)  ## Measure all figures about speed and memory (ARGS="--suite quick" for a look)
	$(PY) -m benchmarks.speed $(ARGS)

test: $(READY)  ## Unit tests and doctests (CI=true: the slow ones as well)
	$(PY) $(PYTEST) $(MARKS) $(ARGS)

test-all: $(READY)  ## All tests, the slow ones included
	$(PY) $(PYTEST) $(ARGS)

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
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf .venv
