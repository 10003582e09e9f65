# make demo: train, evaluate and save a small MLIP model on drawn pairs.
# make test: lint, type checks and tests. make lint: the first two.
# make conformance: transformers' own tests, from the package registry, on every model class.
# make gpu: what needs a CUDA device, in about 8 minutes, with the torch of $(PYTHON) (docs/performance.md).
# Each target first installs everything that it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
ROOMS := hub data evaluation training conversion search

.PHONY: demo test lint types conformance gpu clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m modeling_mlip.training.demo --output_dir runs/demo

lint: .venv/installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not know setup.cfg's package_dir. These links form the installed package, so it checks calls between rooms.
types: .venv/installed
	rm -rf build/types
	mkdir -p build/types/modeling_mlip
	ln -s $(addprefix ../../../,$(wildcard modeling_mlip/*.py) $(ROOMS)) build/types/modeling_mlip
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile # one process per file on each of two cores

conformance: .venv/installed
	$(BIN)/python -m pytest tests/conformance

# Packages of $(PYTHON), such as its torch, are used as they are; the others are installed beside them.
build/gpu/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv --system-site-packages build/gpu
	build/gpu/bin/pip install --quiet --editable '.[test]'
	touch $@

gpu: build/gpu/installed
	build/gpu/bin/python benchmarks/gpu.py $(GPU_FLAGS)

clean:
	rm -rf .venv runs build *.egg-info
