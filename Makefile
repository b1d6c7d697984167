# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all set-up themselves; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# PYTHON=path: another interpreter than the first Python >= 3.11 found on PATH.
# Looked up only where it is used, hence no `:=`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && \
  { echo $$p; break; }; done)
TORCH ?= torch==2.13.0
RUN ?= requirements/run.txt
# What `make test-ranges` takes. PyPI's has CUDA (some GB); for the CPU build: PIP_EXTRA_INDEX_URL=
# https://download.pytorch.org/whl/cpu make test-ranges TORCH_LOWEST=torch==2.10.0+cpu
TORCH_LOWEST ?= torch==2.10.0
# WHEEL=path: an environment of its own with this built wheel, instead of the sources in place.
WHEEL ?=
VENV ?= $(if $(WHEEL),.venv-wheel,.venv)
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
SHOW := $(PY) tools/progress.py
STAMPS := $(VENV)/.stamps
# A process of one thread per core, but not more memory than four need. Tests about threads set how many.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest tests -n auto --maxprocesses 4 --dist worksteal
INSTALLED := $(STAMPS)/$(if $(WHEEL),wheel-$(notdir $(WHEEL)),editable)
REQUIREMENTS := $(filter-out requirements/docs.txt,$(wildcard requirements/*.txt))
# Folders count too: their time changes when a source is removed.
SOURCES := $(shell find csrc) CMakeLists.txt pyproject.toml
NATIVE = $$(find csrc tests/cuda_emu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Most of what pip would compile is never imported; what is, Python compiles then.
INSTALL := install --no-compile

# What is tested is what is installed.
unexport PYTHONPATH TENFOLD_OPS_PATH
# pip leaves bytecode to the first import. Where that may not keep it, each of the hundreds of processes that tests
# start compiles torch again: 3 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-hosts test-ranges bench docs lint format wheel sdist clean setup data
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: data ## the methods end to end on real input: a table, and tenfold-report/index.html
	$(VENV)/bin/tenfold demo

test: data ## all tests but the slow studies; WHEEL=path tests a built wheel in a clean environment
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: data ## the same with all seeds and studies
	$(PYTEST) $(PYTEST_ARGS)

test-hosts: setup ## each host framework's adapter, in an environment of its own
	bash tools/test_hosts.sh $(PY) '$(TORCH)'

test-ranges: wheel ## `make test` of the wheel with the oldest torch and dependencies that pyproject.toml allows
	$(MAKE) WHEEL="$$(ls dist/*.whl)" VENV=.venv-lowest RUN=requirements/lowest.txt TORCH='$(TORCH_LOWEST)' test

bench: data ## microbenchmarks of every op; JSON and HTML under tenfold-report/bench
	$(VENV)/bin/tenfold bench

docs: $(STAMPS)/docs ## the documentation site, without warnings: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "build/site/index.html"

lint: $(STAMPS)/venv ## ruff, mypy on the public API, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

format: $(STAMPS)/venv ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

wheel: $(STAMPS)/build-tools ## a wheel in dist/, with CUDA kernels where nvcc is found
	rm -rf dist
	$(SHOW) $(PY) -m pip wheel -v --no-build-isolation --no-deps -w dist .
	@ls -l dist

sdist: $(STAMPS)/build-tools ## a source distribution in dist/, and a wheel built from nothing else
	rm -rf dist
	$(PY) -c "from scikit_build_core.build import build_sdist; build_sdist('dist')"
	$(SHOW) $(PY) -m pip wheel -v --no-build-isolation --no-deps -w dist dist/*.tar.gz
	@ls -l dist

setup: $(INSTALLED) ## environment and build only

data: $(INSTALLED)
	@$(PY) -m tenfold.data prepare

clean: ## remove the environments and everything built
	rm -rf .venv .venv-wheel .venv-lowest .venv-hosts build dist tenfold-report

# What a build needs, so that it can start before the rest is installed.
$(STAMPS)/build-tools: requirements/build.txt
	@test -n "$(PYTHON)" || { echo "tenfold needs Python >= 3.11 with venv, and none is on PATH." \
	  "Install one (Debian: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tenfold needs" \
	  "Python >= 3.11, and $(PYTHON) is not. Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "== environment $(VENV): $$($(PYTHON) -V), $(TORCH) and pinned tools"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip==26.3
	$(SHOW) $(PY) -m pip $(INSTALL) $(TORCH) -r requirements/build.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/venv: $(STAMPS)/build-tools $(REQUIREMENTS)
	$(SHOW) $(PY) -m pip $(INSTALL) $(TORCH) -r $(RUN) -r requirements/dev.txt
	$(SHOW) $(PY) -m pip $(INSTALL) --no-deps -r requirements/no-deps.txt
	@touch $@

$(STAMPS)/docs: requirements/docs.txt $(STAMPS)/venv
	$(PY) -m pip $(INSTALL) -q -r requirements/docs.txt
	@touch $@

$(STAMPS)/editable: $(STAMPS)/venv $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || { echo "tenfold's kernels need a C++20 compiler, and none" \
	  "was found. Install one (Debian: apt-get install g++) or name it: CXX=/path/to/g++ make" >&2; exit 1; }
	@echo "== build: CPU kernels$$(command -v nvcc >/dev/null && echo ' and CUDA kernels')"
	$(SHOW) $(PY) -m pip install -v --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/wheel-%: $(STAMPS)/venv $(WHEEL)
	@echo "== install $(WHEEL)"
	$(PY) -m pip install -q --no-deps --force-reinstall $(WHEEL)
	@rm -f $(STAMPS)/wheel-* && touch $@
