# `make demo` and `make test` do all set-up themselves; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# WHEEL=path: use this built wheel instead of building the sources in place.
WHEEL ?=
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
PYTEST_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-all test-hosts bench lint format wheel clean setup data

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: data ## run the methods end to end on real input, ending with a table and tenfold-report/index.html
	$(VENV)/bin/tenfold demo

test: data ## all op, method and packaging tests (one seed of each training check)
	$(PY) -m pytest tests -m "not slow" $(PYTEST_ARGS)

test-all: data ## the same with all seeds and studies
	$(PY) -m pytest tests $(PYTEST_ARGS)

test-hosts: ## each host framework's adapter in an environment of its own
	bash tools/test_hosts.sh

bench: data ## microbenchmarks; results and plots under bench/results
	$(VENV)/bin/tenfold bench

lint: setup ## ruff, mypy on the public API, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests/cuda_emu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: setup ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests/cuda_emu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

wheel: setup ## build a wheel into dist/ (CUDA too where nvcc is found)
	rm -rf dist
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls -la dist

setup: $(STAMPS)/install ## environment and build only

data: $(STAMPS)/data

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist

$(STAMPS)/venv: requirements/build.txt requirements/run.txt requirements/dev.txt requirements/no-deps.txt
	@command -v $(PYTHON) >/dev/null || { echo "tenfold needs Python >= 3.11; '$(PYTHON)' was not found. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tenfold needs Python >= 3.11, found $$($(PYTHON) -V). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "== environment $(VENV)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade 'pip>=24'
	$(PY) -m pip install --progress-bar on $(TORCH)
	$(PY) -m pip install -q $(TORCH) -r requirements/build.txt -r requirements/run.txt -r requirements/dev.txt
	$(PY) -m pip install -q --no-deps -r requirements/no-deps.txt
	mkdir -p $(STAMPS); touch $@

ifeq ($(WHEEL),)
$(STAMPS)/install: $(STAMPS)/venv $(SOURCES)
	@echo "== build (CPU kernels, and CUDA kernels where nvcc is found)"
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
else
$(STAMPS)/install: $(STAMPS)/venv $(WHEEL)
	@echo "== install $(WHEEL)"
	$(PY) -m pip install -q --no-deps --force-reinstall $(WHEEL)
	touch $@
endif

$(STAMPS)/data: $(STAMPS)/install
	@echo "== data"
	$(PY) -m tenfold.data prepare
	touch $@
