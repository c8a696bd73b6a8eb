# `make demo` and `make test` set up all they need, from a fresh clone on: Python 3.11 or newer with
# pip, and a C++ compiler. `make` alone lists what there is.
#
# PYTHON: the interpreter the environment is made of. VENV: where it is made.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
CMAKE ?= cmake

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
BUILD := $(INSTALL) --build-constraint constraints.txt
WHAT := '.[report,models,search]'
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE constraints.txt \
  $(shell find csrc src -type f -not -path '*/__pycache__/*')
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h tests/core/*.cpp tests/core/*.h)
FLOOR := 3, 11

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-core test-aarch64 test-sanitizers lint format bench clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train, quantize and measure a small and a real model; minutes the first time
	$(BIN)/python examples/demo.py --out $(OUT)

setup: $(VENV)/.test ## the environment that developers need

test: $(VENV)/.test lint ## all checks and tests, with the C++ core's warnings as errors
	ZEROPOINT_REQUIRE_CORE=1 $(BIN)/python -m pytest tests --pyargs zeropoint

# Without a number, make would start all compilers at once.
JOBS := $(shell getconf _NPROCESSORS_ONLN)
# Where the core is slow, emulated or watched, only each EVERYth problem is solved; EVERY=1: all.
EVERY ?= 5
CORE_TESTS := -DZEROPOINT_PYTHON=OFF -DZEROPOINT_CORE_TESTS=ON -DZEROPOINT_WERROR=ON

test-core: ## the core alone, without Python, against loops that anyone can check by eye
	$(CMAKE) -S . -B build/core $(CORE_TESTS)
	$(CMAKE) --build build/core --parallel $(JOBS)
	build/core/test_core

# Under qemu-user, as a CPU that has everything, one without matrix products, one without the dot
# product: each must run just what it has.
QEMU := qemu-aarch64-static -L /usr/aarch64-linux-gnu
test-aarch64: ## the core's NEON kernels, cross-compiled and emulated
	@command -v aarch64-linux-gnu-g++ qemu-aarch64-static >/dev/null || { echo "this needs \
	g++-aarch64-linux-gnu and qemu-user-static (Debian's names)"; exit 1; }
	$(CMAKE) -S . -B build/aarch64 --toolchain cmake/aarch64-linux-gnu.cmake $(CORE_TESTS)
	$(CMAKE) --build build/aarch64 --parallel $(JOBS)
	printf '%s\n' 'max neoni8mm,neondot,neon,portable' 'cortex-a76 neondot,neon,portable' \
	  'cortex-a53 neon,portable' | xargs -P $(JOBS) -L 1 sh -c \
	  'told=$$($(QEMU) -cpu $$0 build/aarch64/test_core --every=$(EVERY) --isas=$$1); code=$$?; \
	  printf "%s\n%s\n" "$$0" "$$told"; exit $$code'

# The extension is built a second time, beside a copy of the package. Leaks are not looked for:
# Python and torch keep what they have until the end. -s: pytest would swallow the report.
SANITIZED := build/sanitizers
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
test-sanitizers: $(VENV)/.test ## the kernels' tests, stopping at undefined behaviour
	$(BUILD) 'nanobind>=3.0,<4'
	$(CMAKE) -S . -B $(SANITIZED) -DZEROPOINT_SANITIZE=ON -DZEROPOINT_CORE_TESTS=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(CMAKE) --build $(SANITIZED) --parallel $(JOBS)
	$(SANITIZED)/test_core --every=$(EVERY)
	rm -rf $(SANITIZED)/python
	mkdir -p $(SANITIZED)/python
	cp -r src/zeropoint $(SANITIZED)/python
	$(CMAKE) --install $(SANITIZED) --prefix $(SANITIZED)/python
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath $(SANITIZED)/python) \
	  ZEROPOINT_REQUIRE_CORE=1 $(BIN)/python -m pytest -s tests/test_kernels.py \
	  tests/test_kernels_process.py tests/test_kernels_one_answer.py tests/test_kernels_groups.py \
	  tests/test_kernels_quick.py tests/test_fused.py

lint: $(VENV)/.test ## style and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.test ## bring Python and C++ files into style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.test ## time single layers, then a model, against torch
	$(BIN)/python benchmarks/bench_linear.py --quick --fresh
	$(BIN)/python benchmarks/bench_model.py

clean: ## remove the environment and all that was built
	rm -rf $(VENV) build $(OUT)

# The stamps: an environment is made once, the package installed again when a source has changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= ($(FLOOR)) else "$(PYTHON) is \
	Python " + sys.version.split()[0] + ", and 3.11 or newer is needed: say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	@touch $@

# As users install it: without a compiler, the Python part alone.
$(VENV)/.demo: $(VENV)/.made $(SOURCES)
	$(BUILD) $(WHAT)
	@touch $@

# As developers need it: with the tools, and no tests of a package that lost its core.
$(VENV)/.test: $(VENV)/.made $(SOURCES)
	ZEROPOINT_REQUIRE_CORE=1 $(BUILD) -C cmake.define.ZEROPOINT_WERROR=ON \
	  --group lint --group test $(WHAT)
	@touch $@
