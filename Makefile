# The project's habits. On a fresh machine with Python and a C++ compiler, each target first makes
# .venv, builds convext in it and installs the tools; later calls rebuild only what changed.
#
#   make train ARGS="--epochs 5"      PYTHON=python3.12     the Python that .venv is made from
#   make test ARGS="-k conv2d -x"     TORCH=torch==2.14.1   the torch that .venv holds
#   make test TEST_JOBS=0 ARGS=--pdb  MAX_JOBS=4            parallel compilations
#                                     TEST_JOBS=4           parallel tests; 0 is pytest alone

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Once .venv has a torch, it stays until another is named.
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),torch==2.13.0)
MAX_JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export MAX_JOBS
# A process imports torch and lists all tests before it runs any: more than eight gain nothing.
TEST_JOBS ?= $(shell echo $$(($(MAX_JOBS) > 8 ? 8 : $(MAX_JOBS))))
# As if .venv were activated: one ninja for every build, whatever else is installed.
export PATH := $(CURDIR)/$(BIN):$(PATH)

PIP := $(BIN)/python -m pip --disable-pip-version-check
# With its folders, whose times tell that a file was added or removed.
CSRC := $(shell find csrc)
# A file's tests stay in one process, and with them what they build once. In order, for those that
# take longest come early in the alphabet.
PYTEST := $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
NO_DEPS := tests/requirements-no-deps.txt
NVCC := tests/requirements-nvcc.txt
CXX_FILES = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-fast bench bench-kernels lint format clean FORCE
.PHONY: cuda-check cuda-emulate cuda-sanitize gpu-test gpu-bench gpu-report

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

train: $(VENV)/.built ## train the MNIST CNN on our kernels
	$(BIN)/python -m convext train $(ARGS)

test: $(VENV)/.built ## every test
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.built ## the tests not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

bench: $(VENV)/.built ## our kernels beside PyTorch's
	$(BIN)/python -m convext bench $(ARGS)

bench-kernels: $(VENV)/.built ## each kernel by itself, under pytest-benchmark
	$(BIN)/python -m pytest benchmarks/kernels.py $(ARGS)

cuda-check: $(VENV)/.built ## compile the CUDA half, without a GPU; nvcc is installed where none is
	$(BIN)/python tests/cuda_check.py --find || $(PIP) install --no-deps -r $(NVCC)
	$(BIN)/python tests/cuda_check.py --jobs $(MAX_JOBS) $(ARGS)

cuda-emulate: $(VENV)/.built ## the CUDA kernels on the CPU, the whole list of problems
	$(PYTEST) --emulate-all tests/test_cuda_*.py $(ARGS)

# Without the tests of the emulator, which make every build of its own anyway.
cuda-sanitize: $(VENV)/.built ## a selection of that on builds that find races and bad addresses
	for build in race address; do $(BIN)/python tests/sanitized_cuda.py $$build -n $(TEST_JOBS) --dist loadfile \
	  tests/test_cuda_emulated.py tests/test_cuda_batch_norm.py -k "equals_torch or same_bits" $(ARGS) || exit; done

gpu-test: $(VENV)/.built ## the tests of CUDA, on a GPU, which must be there
	CONVEXT_TEST_DEVICE=cuda $(BIN)/python -m pytest -n $(TEST_JOBS) $(ARGS)

gpu-bench: $(VENV)/.built ## our CUDA kernels beside cuDNN's
	$(BIN)/python -m convext bench --device cuda $(ARGS)

gpu-report: ## all there is to see on a GPU, in ten minutes, with the PYTHON and torch that are there
	$(PYTHON) tests/gpu_report.py $(ARGS)

lint: $(VENV)/.built ## check style and format, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.built ## put format and imports right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info convext/*.so convext/_built_with.py $(VENV)/.built
	rm -rf .pytest_cache .ruff_cache .benchmarks
	find convext tests benchmarks build_backend -name __pycache__ -prune -exec rm -rf {} +

# Everything where the package's description or torch changed, else only the compiled part.
# Torch is named again so that no dependency can put another in its place. The packages in NO_DEPS
# would; only tests use them, and skip without.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(NO_DEPS) $(CSRC)
	$(if $(filter-out $(CSRC),$?),\
	  $(PIP) install --no-build-isolation -e ".[all]" "$(TORCH)" \
	    && { $(PIP) install --no-deps -r $(NO_DEPS) || echo "not installed: $(NO_DEPS)" >&2; },\
	  $(BIN)/python setup.py --quiet build_ext --inplace)
	@touch $@

# Holds the requirement that was installed; rewritten only when TORCH differs.
$(VENV)/.torch: $(BIN)/python FORCE
	@[ "$$(cat $@ 2>/dev/null)" = "$(TORCH)" ] || { set -ex; \
	  $(PIP) install "$(TORCH)" "setuptools>=77" ninja; \
	  echo "$(TORCH)" > $@; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "convext needs Python 3.10 or newer, but $(PYTHON) is" \
	    "'$$($(PYTHON) --version 2>&1)'; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "convext needs a C++ compiler, but '$${CXX:-c++}' was not found;" \
	    "install one (Debian: g++, macOS: xcode-select --install) or name it in CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
