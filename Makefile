# make demo: train, evaluate and save a small MLIP model on drawn pairs. make test: lint, types and tests.
# make conformance: transformers' own tests, from the package registry, on every class.
# All set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint conformance clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m modeling_mlip.training.demo --output_dir runs/demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

conformance: .venv/installed
	$(BIN)/python -m pytest tests/conformance

clean:
	rm -rf .venv runs build *.egg-info
