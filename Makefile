# make demo   environment, synthetic cohort, training, evaluation, prediction, report
# make test   environment and tests
# make test-browser   the Space in Debian's chromium, where it is installed
# make lint   style and format, as checked before a merge
# make model-cards   folders under model_cards/ as they would be published, from the runs that are here
# make bench  speed and memory, as ratios within one run

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/demo/patients

.PHONY: demo test test-slow test-browser lint format model-cards bench clean

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/lymph synth data/demo --patients 60 --seed 0
	$(BIN)/lymph synth data/demo-test --patients 60 --seed 1
	$(BIN)/lymph cohort check data/demo --output data/demo-cohort.png
	$(BIN)/lymph recipe scripts/recipes/demo.yaml
	$(BIN)/lymph evaluate $(RUN) --data data/demo-test
	$(BIN)/lymph predict $(RUN) --data data/demo-test --output $(RUN)/demo-test.csv
	$(BIN)/lymph explain $(RUN) --data data/demo-test --patient P001 --output $(RUN)/explanations
	$(BIN)/python scripts/quickstart.py $(RUN)/lymph-mil data/demo-test

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow and not browser"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-browser: $(INSTALLED)
	@if test -x /usr/bin/chromium; then \
	  $(BIN)/python -m pip install --quiet --editable '.[browser]' && $(BIN)/python -m pytest -m browser -rs tests/browser; \
	else echo "test-browser skipped: /usr/bin/chromium is not installed (apt-get install chromium)"; fi

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model-cards: $(INSTALLED)
	$(BIN)/python scripts/model_cards.py

bench: $(INSTALLED)
	for script in scripts/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf runs/demo data/demo data/demo-test data/demo-cohort.png
