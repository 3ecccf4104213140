# make demo   environment, synthetic cohort, training, evaluation, prediction, report
# make test   environment and tests
# make lint   style and format, as checked before a merge
# make bench  speed and memory, as ratios within one run

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/demo

.PHONY: demo test test-slow lint format bench clean

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/lymph synth data/demo --patients 60 --seed 0
	$(BIN)/lymph synth data/demo-test --patients 60 --seed 1
	$(BIN)/lymph cohort check data/demo --output $(RUN)-cohort.png
	$(BIN)/lymph train --config scripts/recipes/demo.yaml --output $(RUN) --resume
	$(BIN)/lymph evaluate $(RUN) --data data/demo-test
	$(BIN)/lymph predict $(RUN) --data data/demo-test --output $(RUN)/demo-test.csv
	$(BIN)/python scripts/quickstart.py $(RUN)/lymph-mil data/demo-test

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	for script in scripts/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf runs/demo data/demo data/demo-test
