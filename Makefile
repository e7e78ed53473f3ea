# Everything runs from .venv, which `setup` makes; every other target makes it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo mlflow test test-slow test-cluster lint bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/bootvit train digits/joint name=demo-joint data.fraction=0.2 ray.num_workers=2 --overwrite
	$(BIN)/bootvit sweep sweeps/digits-fractions --overwrite
	$(BIN)/bootvit report --sweep digits-fractions --out report

mlflow: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m 'not slow and not cluster and not gpu'

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not gpu'

test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scale

clean:
	rm -rf $(VENV) runs mlruns mlflow.db
