# Two commands set up everything: `make demo` and `make test`. Only Python >= 3.11, make and a C++ compiler are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all lint bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,torchopt]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(DEMO)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(PYTEST)

test-all: setup
	$(BIN)/python -m pytest $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python bench/overhead.py

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache
