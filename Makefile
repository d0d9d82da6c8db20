# Two commands for a newcomer: make demo, make test. Both set up .venv first, from pinned versions, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := docker/constraints.txt
STAMP := $(VENV)/.installed

.PHONY: demo reproduce test lint clean

demo: $(STAMP)
	$(BIN)/dist-train demo

# The released Perov-5 model anew, from its training to its figures: about half an hour on 2 cores.
reproduce: $(STAMP)
	$(BIN)/dist-train voxelize --config launch/runs/perov_5.yaml
	$(BIN)/dist-train train --config launch/runs/perov_5.yaml
	$(BIN)/dist-train evaluate --model runs/perov_5/train/bundle --data data/benchmarks/perov_5_test_half_a.parquet \
	    --training data/sample/perov_5.parquet --move 1 --out runs/perov_5/test

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2.6 GiB, a few minutes"
# torch first and alone: other packages, asked first, would take its newest release instead of the pinned one.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs
