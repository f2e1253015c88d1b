# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test lint typecheck unit bench clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything in it

# Made again only when pyproject.toml changes; the stamp is written last, so a failed setup repeats.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "colddiff needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## train, evaluate, table and figure on real digits; minutes on two cores
	$(BIN)/python jobs/launch.py train --preset demo --cluster debug --experiment demo
	$(BIN)/python analysis/table1.py --experiment demo --out reports/demo
	$(BIN)/python analysis/figure3.py --experiment demo --out reports/demo
	@echo
	@echo "Table and figure: reports/demo/table1.md and reports/demo/figure3.png"
	@echo "MLflow:           $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

test: lint typecheck unit  ## lint, types, import contracts, unit tests with coverage

lint: $(READY)  ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(READY)  ## mypy --strict
	$(BIN)/mypy

unit: $(READY)  ## pytest with coverage of colddiff
	$(BIN)/pytest --cov --cov-report=term --cov-fail-under=90

bench: $(READY)  ## speed, as ratios to plain references
	$(BIN)/python benchmarks/degradation.py

clean:  ## remove what make made; runs and MLflow's record stay
	rm -rf $(VENV) reports .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
