# On a fresh machine with Python 3.10+ and make: `make demo`, `make test`. Nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
TRANSFORMERS_OLDEST := 5.17.0
PYTEST := -m pytest -n auto
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-oldest lint format samples clean

demo: $(VENV)/ready  ## convert sample:gpt2 from 12 heads to 8/4, uptrain it, report, let it write
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/ready  ## the whole suite, offline
	$(BIN)/python $(PYTEST)

test-oldest: $(OLDEST)/ready  ## the same with the oldest transformers supported
	$(OLDEST)/bin/python $(PYTEST)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

samples: $(VENV)/ready  ## train sample:gpt2 and sample:t5 again; their weights are frozen, so only to look
	$(BIN)/python benchmarks/train_samples.py gpt2 --steps 8000 --batch 8 --lr 2e-3 --output build/samples --results build/samples
	$(BIN)/python benchmarks/train_samples.py t5 --steps 4200 --batch 8 --lr 3e-3 --output build/samples --results build/samples

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -i -E '^(transformers|huggingface)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]' transformers==$(TRANSFORMERS_OLDEST)
	touch $@
