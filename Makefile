# What a person or a CI machine calls; `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
BUILT := build/.kernels
SHELL_FILES := run.sub run_and_time.sh run_with_docker.sh .ci/run \
    $(wildcard configs/*.sh configs/systems/*.sh */launch.sh */recipes/*.sh public-scripts/*.sh tools/*.sh)
CPP_FILES := $(wildcard */csrc/* tests/emulation/*.h tests/emulation/*.cu)
BENCHES := $(patsubst tools/bench/%.py,tools.bench.%,$(filter-out %/__init__.py,$(wildcard tools/bench/*.py)))
PYTEST := OMP_NUM_THREADS=1 PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

.PHONY: help setup ops demo test test-slow test-slurm test-docker test-tpu lint bench gpu gpu-carry clean

help: ## this list
	@sed -nE 's/^([a-z0-9%-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20
	@echo
	@echo "  PYTHON=python3.12   the interpreter of .venv (now: $(PYTHON)); 3.11 or newer"
	@echo "  PIP_INDEX_URL=URL   the package index, as pip reads it"
	@echo "  PIP_ARGS=ARGS       more arguments of pip; the CPU wheels of torch, 0.3 instead of 5.5 GB:"
	@echo '                      make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'
	@echo '  PYTEST_ARGS=ARGS    more arguments of pytest, such as "-x -k loss"'

setup: $(READY) $(BUILT) ## .venv with the versions of requirements.lock; the kernels if there is g++

$(READY): requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: Python 3.11 or newer is needed, and $(PYTHON) is $$("$(PYTHON)" --version 2>/dev/null || echo none)." >&2; \
	    echo "      Choose another: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	"$(BIN)/pip" install --disable-pip-version-check --quiet -r requirements.lock $(PIP_ARGS)
	@touch $@

# Where no GPU's driver is, the CPU's code alone: seconds instead of minutes.
$(BUILT): $(READY) setup.py $(wildcard */csrc/*)
	@mkdir -p build
	@if KERNELS=$${KERNELS:-$$([ -e /dev/nvidiactl ] || echo cpu)} "$(BIN)/python" setup.py build_ext --inplace >build/kernels.log 2>&1; \
	then touch $@; else \
	    echo "make: the kernels were not built (build/kernels.log says why); the PyTorch references run instead" >&2; fi
	@sed -n 's/^setup.py: /make: /p' build/kernels.log

# The compilers' command lines are shortened here, so that what setup.py says is seen; build/kernels.log has all of it.
ops: $(READY) ## the kernels, for GPUs too where nvcc is; TORCH_CUDA_ARCH_LIST="9.0 10.0+PTX": for which
	@mkdir -p build
	@"$(BIN)/python" setup.py build_ext --inplace 2>&1 | tee build/kernels.log | sed -uE 's/^(.{120}).{280,}$$/\1 .../' || { \
	    echo "make: the kernels were not built (build/kernels.log has the whole of it)" >&2; exit 1; }
	@sed -n 's/^setup.py: /make: /p' build/kernels.log
	@touch $(BUILT)

demo: $(READY) $(BUILT) ## train a small RetinaNet on generated scenes, check its log, draw the report: results/demo
	@PATH="$(BIN):$$PATH" PYTHON="$(BIN)/python" tools/demo.sh

demo-%: $(READY) $(BUILT) ## the same with a small model of another benchmark: make demo-ssd300, results/demo-ssd300
	@PATH="$(BIN):$$PATH" PYTHON="$(BIN)/python" tools/demo.sh $*

test: $(READY) ## every CPU test but the slow ones
	@$(PYTEST) -m "not slow and not gpu and not slurm and not docker and not dali and not tpu"

test-slow: $(READY) ## the CPU tests that take minutes, and those of DALI
	@$(PYTEST) -m "(slow or dali) and not gpu and not slurm and not docker and not tpu"

test-slurm: $(READY) ## run.sub on a real Slurm of two nodes on this machine (root; Debian's slurm packages)
	@$(PYTEST) -n 0 -m slurm

test-docker: $(READY) ## the image, really built (root; Debian's buildah and debootstrap)
	@$(PYTEST) -n 0 -m docker

test-tpu: $(READY) ## the TPU path on the CPU, two ways, in environments of their own: build/tpu, 13 GB
	@$(PYTEST) -n 0 -s -m tpu

gpu: $(READY) ## on a GPU: build, gpu tests and every measurement, eight minutes: results/gpu
	@OMP_NUM_THREADS=4 PATH="$(BIN):$$PATH" "$(BIN)/python" -m tools.gpu_check --out results/gpu

gpu-carry: $(READY) ## what a GPU machine without network lacks, for gpu_check --carried: build/carry
	@"$(BIN)/python" -m tools.gpu_carry

lint: $(READY) ## ruff, clang-format, shellcheck, shfmt, hadolint
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/clang-format" --dry-run -Werror $(CPP_FILES)
	@"$(BIN)/shellcheck" --shell=bash --external-sources --source-path=SCRIPTDIR $(SHELL_FILES)
	@"$(BIN)/shfmt" -i 4 -d $(SHELL_FILES)
	@"$(BIN)/hadolint" Dockerfile

bench: $(READY) ## every tools/bench/*.py: ours beside its baseline
	@for bench in $(BENCHES); do echo "== $$bench"; "$(BIN)/python" -m "$$bench"; done

clean: ## remove what demo and tests made; .venv stays
	rm -rf build results/demo results/demo-* results/run .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
