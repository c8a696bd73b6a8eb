# `make demo` and `make test` set up all they need, from a fresh clone on: Python 3.11 or newer with
# pip, and a C++ compiler. `make` alone lists what there is.
#
# PYTHON: the interpreter the environment is made of. VENV: where it is made.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
BUILD := $(INSTALL) --build-constraint constraints.txt
WHAT := '.[report,models]'
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE constraints.txt \
  $(shell find csrc src -type f -not -path '*/__pycache__/*')
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
FLOOR := 3, 11

.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train, quantize and measure a small and a real model; minutes the first time
	$(BIN)/python examples/demo.py --out $(OUT)

test: $(VENV)/.test lint ## all checks and tests, with the C++ core's warnings as errors
	ZEROPOINT_REQUIRE_CORE=1 $(BIN)/python -m pytest tests --pyargs zeropoint

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
