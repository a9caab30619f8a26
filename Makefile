# On a fresh machine with Python 3.10+ and make: `make demo`, `make test`. Nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
TRANSFORMERS_OLDEST := 5.17.0
SMOKE := build/smoke
AUDIT := build/audit
PYTEST := -m pytest -n auto --dist worksteal
ON_TRANSFORMERS := models checkpoints random_architectures plan calibrate distill flops uptraining resume verify speed hub data
LONGER_ON_TRANSFORMERS := models calibrate uptraining
export HF_HUB_OFFLINE = 1

.PHONY: demo test integration test-oldest lint format docs dist smoke notebooks audit samples clean

demo: $(VENV)/ready  ## convert sample:gpt2 from 12 heads to 8/4, uptrain it, report, let it write
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/ready  ## the suite, offline, and how much of the package it reaches
	$(BIN)/python $(PYTEST) --cov --cov-report=term --cov-fail-under=92

integration: $(VENV)/deepspeed  ## what takes longer, several processes, and PEFT, ONNX, lm-evaluation-harness, pipelines, the documentation's examples
	$(BIN)/python $(PYTEST) -m integration

test-oldest: $(OLDEST)/ready  ## what depends on transformers, with the oldest release supported
	$(OLDEST)/bin/python $(PYTEST) $(ON_TRANSFORMERS:%=tests/test_%.py)
	$(OLDEST)/bin/python $(PYTEST) -m integration $(LONGER_ON_TRANSFORMERS:%=tests/test_%.py)

lint: $(VENV)/ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready  ## the documentation, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/ready  ## wheel and source distribution, checked
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

smoke: dist  ## every command and snippet of README.md and docs/, from the installed wheel, offline
	rm -rf $(SMOKE)
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[lora,eval,rouge,onnx,quantize]"
	$(SMOKE)/bin/python tests/smoke.py

notebooks: $(VENV)/ready  ## run them all
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 notebooks

audit:  ## what is installed beside this package: known vulnerabilities (asks pypi.org), licences
	$(PYTHON) -m venv --clear $(AUDIT)/installed
	$(PYTHON) -m venv --clear $(AUDIT)/tools
	$(AUDIT)/installed/bin/pip install --quiet --constraint constraints.txt .
	$(AUDIT)/tools/bin/pip install --quiet pip-audit pip-licenses
	$(AUDIT)/tools/bin/pip-licenses --python=$(AUDIT)/installed/bin/python --format=markdown --from=mixed --with-system
	$(AUDIT)/installed/bin/pip freeze --exclude sqa-convert > $(AUDIT)/frozen.txt
	sed 's/+.*//' $(AUDIT)/frozen.txt > $(AUDIT)/installed.txt  # as pypi.org knows it: no +cpu
	$(AUDIT)/tools/bin/pip-audit --strict --no-deps --disable-pip -r $(AUDIT)/installed.txt

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

samples: $(VENV)/ready  ## train sample:gpt2 and sample:t5 again; their weights are frozen, so only to look
	$(BIN)/python benchmarks/train_samples.py gpt2 --steps 8000 --batch 8 --lr 2e-3 --output build/samples --results build/samples
	$(BIN)/python benchmarks/train_samples.py t5 --lr 1e-3 --output build/samples --results build/samples

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/deepspeed: $(VENV)/ready  # where it cannot be installed, the tests that need it are skipped and say so
	($(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel ninja && \
	 DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed) \
	|| echo "integration: DeepSpeed cannot be installed here"
	touch $@

$(OLDEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -i -E '^(transformers|huggingface)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]' transformers==$(TRANSFORMERS_OLDEST)
	touch $@
