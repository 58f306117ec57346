# Two commands on a fresh machine with Python 3.11 or newer:
#
#   make train    set everything up and run the main job
#   make test     set everything up and run the tests
#
# Others: setup, conformance, lint, types, bench, gpu, clean. Everything lives in .venv, build and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
READY := $(VENV)/.ready
TESTS_READY := $(VENV)/.tests-ready
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cuh csrc/*.cu csrc/fused_kernels/*) \
  csrc/build.py csrc/jobs.py csrc/toolchain.py
HAVE_NVCC := command -v nvcc >/dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]
# CUTLASS's headers, to compile the fused kernels with, and two tools that read machine code
FOR_FUSED := nvidia-cutlass nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
FOLDERS := core csrc comm moe models data parallel launch
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c requirements/constraints.txt
# a file for each core at a time; in conformance, a test
BY_FILE := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# their ranks share a core: one set of processes for each core is the fastest
CONFORMANCE := tests/conformance tests/resharding
ONE_FOR_EACH_CORE := $(BIN)/python -m pytest -n auto

.PHONY: help setup train test conformance lint types bench gpu clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

setup: $(READY)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "coterie needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version); \
	name another with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 2; }

# torch first: the native ops are compiled against the torch that will run them
$(READY): $(VENV)/bin/python pyproject.toml setup.py requirements/constraints.txt $(NATIVE)
	@echo "== installing torch into $(VENV) (minutes the first time)"
	@$(PIP) torch setuptools wheel
	@echo "== installing coterie, compiling the native ops"
	@$(PIP) --no-build-isolation -e .
	@$(BIN)/python -c 'from coterie.csrc.loader import status; \
	  reason = next((s.reason for s in status() if s.device == "cpu" and s.fix), ""); \
	  print("== native CPU ops:", f"not used ({reason}); plain PyTorch runs instead" if reason else "compiled")'
	@echo "== what else runs here, and what would fix gaps:  $(BIN)/coterie doctor"
	@touch $(READY)

# the tests hold the layer against Hugging Face's, megatron-core's and DeepSpeed's; CUTLASS comes
# first: the fused kernels are compiled where it is, for minutes that `make train` need not wait
$(TESTS_READY): $(READY)
	@echo "== installing what the tests need"
	@if $(HAVE_NVCC); then \
	  echo "== compiling the fused kernels too (minutes)"; $(PIP) --no-deps $(FOR_FUSED); fi
	@$(PIP) --no-build-isolation -e '.[dev,hf,megatron,deepspeed]'
	@touch $(TESTS_READY)

# the main job is small: it runs on the CPU, with the same figures everywhere
train: export CUDA_VISIBLE_DEVICES :=
train: $(READY)
	@if [ -e $(RUN)/config.yaml ]; then \
	  echo "== going on with $(RUN)"; $(BIN)/coterie resume $(RUN); \
	else \
	  echo "== training configs/quickstart.yaml into $(RUN)"; $(BIN)/coterie train quickstart --run-dir $(RUN); \
	fi
	@echo "== held-out loss, and of ten captions how many digits can be read"
	@$(BIN)/coterie evaluate $(RUN)
	@echo "== look:  $(BIN)/tensorboard --logdir $(RUN)"
	@echo '== draw:  $(BIN)/coterie generate $(RUN) --prompt "a digit seven"'

test: $(TESTS_READY)
	@echo "== running the tests"
	@failed=0; \
	  $(BY_FILE) $(CONFORMANCE:%=--ignore=%) || failed=1; \
	  $(ONE_FOR_EACH_CORE) $(CONFORMANCE) || failed=1; \
	  exit $$failed

# N of the layouts of eight processes, the same each time, or N=all; CI runs the chosen ones alone
N ?= 100
conformance: $(TESTS_READY)
	@CONFORMANCE=$(N) $(ONE_FOR_EACH_CORE) tests/conformance

lint: $(TESTS_READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy is shown the namespace package through a link, since no folder is named coterie
types: $(TESTS_READY)
	@mkdir -p build/typing && ln -sfn ../.. build/typing/coterie
	@cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml $(FOLDERS:%=-p coterie.%)

bench: $(TESTS_READY)
	@$(BIN)/python benchmarks/layer.py
	@$(BIN)/python benchmarks/rows.py

# on a machine with a Hopper GPU: a Python whose torch has CUDA is all that it needs (docs/gpu.md)
gpu:
	@for python in $(PYTHON) $(BIN)/python; do \
	  if $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    exec $$python benchmarks/gpu/run.py; \
	  fi; \
	done; \
	echo "make gpu needs a Python whose torch sees a GPU, and neither $(PYTHON) nor $(BIN)/python has \
one; name another with: make PYTHON=/path/to/python gpu"; exit 2

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis csrc/*.so csrc/build.json
