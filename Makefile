# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SLURM_PACKAGES := munge mariadb-server slurm-client slurmctld slurmd slurmdbd postgresql

.PHONY: help setup demo test lint typecheck unit test-slurm slurm-packages bench clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything in it

# Made again only when pyproject.toml changes; the stamp is written last, so a failed setup repeats.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "colddiff needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@# pip would compile one file after the other, and the tests of all libraries. Some files are
	@# for other Pythons, and do not compile.
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	@touch $(READY)

demo: $(READY)  ## train, evaluate, table and figure on real digits; minutes on two cores
	$(BIN)/python jobs/launch.py train --preset demo --cluster debug --experiment demo
	$(BIN)/python analysis/table1.py --experiment demo --preset demo --out reports/demo
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
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile \
		--cov --cov-report=term --cov-fail-under=90

test-slurm: $(READY) slurm-packages  ## tests on a real Slurm; as root, gets Debian's packages of it
	COLDDIFF_REQUIRE_SLURM=1 $(BIN)/pytest tests/cluster

slurm-packages:
	@test "$$(id -u)" = 0 || { echo "make test-slurm starts daemons: run it as root"; exit 1; }
	@dpkg --status $(SLURM_PACKAGES) >/dev/null 2>&1 || { apt-get update && \
		apt-get install --yes --no-install-recommends $(SLURM_PACKAGES); }

bench: $(READY)  ## speed, as ratios to plain references: benchmarks/REPORT.md
	$(BIN)/python benchmarks/report.py

clean:  ## remove what make made; runs and MLflow's record stay
	rm -rf $(VENV) reports .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
