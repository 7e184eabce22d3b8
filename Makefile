# Needs Python >= 3.11 and make, nothing else, and no root.
#   make PYTHON=python3.12 ...               another interpreter (after `make clean`, if .venv exists)
#   make test PYTEST_ARGS="-k store -x"      anything pytest takes
#   make bench BENCHMARKS=regression BENCH_ARGS=--small

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Those with claims; the others are what they share, or parts of one.
BENCHMARKS ?= $(filter-out report docs published editing regression_% gate_gradients_% reproduction_% editing_%,$(sort $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))))

VENV := .venv
# `python -m tool` and not .venv/bin/tool: works in a checkout that was moved, too.
RUN := $(VENV)/bin/python -m
PIP_INSTALL := $(RUN) pip install --disable-pip-version-check -c requirements.txt
INSTALLED := $(VENV)/.installed
INSTALLED_BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-fast lint format notebooks bench clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with coar (editable) and what its development needs

demo: $(INSTALLED) ## train a small network, attribute, predict, edit: the whole line in three minutes
	$(VENV)/bin/coar demo

test: lint ## everything that must pass: lint, then all tests and the examples in docstrings
	$(RUN) pytest --doctest-modules tests coar $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## the tests that take milliseconds
	$(RUN) pytest -m "not slow" $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff (rules and format) and mypy, changing nothing
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(INSTALLED) ## let ruff rewrite what it can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

notebooks: $(INSTALLED) ## run notebooks/*.py and write the .ipynb beside them, a few minutes
	$(RUN) scripts.make_notebooks

bench: $(INSTALLED_BENCH) ## run every benchmark; exit status 1 where a claim does not hold
	@[ -n "$(BENCHMARKS)" ] || { echo "there is nothing in benchmarks/" >&2; exit 1; }
	@status=0; \
	for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(RUN) benchmarks.$$name $(BENCH_ARGS) || status=1; \
	done; \
	exit $$status

clean: ## remove .venv, caches and builds, but no results (runs/)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were made from, or pip runs again.
$(INSTALLED): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; print("Python", sys.version.split()[0], sys.executable); sys.exit(sys.version_info < (3, 11))' || \
	  { echo "coar needs Python >= 3.11 as '$(PYTHON)'. If you have one by another name: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu it is in the package python3-venv." >&2; exit 1; }
	$(PIP_INSTALL) -e ".[dev,vision,language]"
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED)
	$(PIP_INSTALL) -e ".[dev,vision,language,bench]" ipython
	# Peers of the regression, without what they ask for beside: old releases of numpy, in one case.
	$(PIP_INSTALL) --no-deps adelie==1.1.52 celer==0.7.4 skglm==0.5
	@touch $@
