# One entry point for people and for CI. Each target installs what it needs into .venv and no more:
#   make demo     raw crawl -> trained, resumed, talking model, with a report (about 5 minutes, CPU)
#   make test     every test
#   make check    lint, format, types, import contracts
#   make format   apply the formatter and the safe lint fixes
#   make setup    only make .venv from requirements.lock

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: byte-compiling on first import is less work than compiling everything.
# DeepSpeed comes as source that asks the torch of this environment (no build isolation) what to
# build: nothing (DS_BUILD_OPS=0).
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile

export HF_HUB_OFFLINE := 1
# Byte code is kept even where an image says otherwise: not one start compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup dev demo test check format lock clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,7s/^# *//p' Makefile

setup: $(VENV)/.runtime
dev: $(VENV)/.dev

$(VENV)/.runtime: requirements.lock pyproject.toml
	@echo "Installing the pinned requirements into $(VENV) (about a minute) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r requirements.lock
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo "Installing the development tools into $(VENV) ..."
	@DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation -r requirements-dev.lock
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --no-loadscope-reorder

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Renew both lock files from what pyproject.toml allows today.
lock:
	bash launch/lock.sh

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
