# One virtual environment, built once and reused: every target makes what it needs and nothing twice.
# PYTHON=python3.12 picks the interpreter, VENV=dir the environment, KDKERNELS_CUDA=auto|0|1 the CUDA library.

PYTHON ?= python3
VENV ?= .venv
CXX := $(if $(filter default,$(origin CXX)),g++,$(CXX))
TORCH ?= torch==2.13.0 triton==3.7.1
EXTRAS ?= train,test,bench,docs,dev
PYTEST_ARGS ?=
SANITIZE ?=

export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_RETRIES ?= 10

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: build  ## set up, then train a teacher and distil a student (runs/demo; goes on where it was stopped)
	$(VENV)/bin/kdkernels distill $(if $(wildcard runs/demo/config.json),--resume,--out) runs/demo

# A thread for each process: those that share cores wait long for one another's threads.
test: build lint  ## set up, then check style and types and run the tests (PYTEST_ARGS="-k renyi")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/installed  ## style and types
	$(PY) -m ruff check .
	$(PY) -m mypy

pyright: $(VENV)/installed  ## types once more, by pyright (which fetches itself from npm the first time)
	$(PY) -m pyright

docs: build  ## the API reference: build/docs/index.html
	$(PY) -m benchmarks.pages.reference

sanitize: build  ## the C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (SANITIZE=quick)
	$(PY) tests/sanitize.py $(SANITIZE)

build: build/built  ## set up, and compile what changed in csrc/

clean:  ## remove what was compiled (the environment stays: rm -r .venv)
	rm -rf build dist *.egg-info kdkernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find kdkernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A dropped connection in a large download is worth another try; pip keeps what it already has.
$(VENV)/torch: Makefile
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python >= 3.10, or make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.12 (or another)" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "$(CXX) not found: install g++ (or clang++), or make CXX=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
	    || { echo "no virtual environment: does $(PYTHON) lack venv (Debian: apt install python3-venv)?" >&2; exit 1; }
	@echo "installing $(TORCH) into $(VENV) (hundreds of megabytes the first time)"
	@for try in 1 2 3; do \
	    $(PIP) $(TORCH) numpy ninja 'setuptools>=77,<82' && break; \
	    test $$try -lt 3 || exit 1; echo "trying again"; sleep 5; \
	done
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py build_backend.py
	@echo "installing kdkernels[$(EXTRAS)] and compiling csrc/"
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]' $(TORCH)
	@touch $@

build/built: $(VENV)/installed $(SOURCES)
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

.PHONY: help demo test lint pyright docs sanitize build clean
