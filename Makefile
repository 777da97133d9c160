# Every target does its own set-up: a fresh clone needs only python3 (3.11 or 3.12) with venv, and make.
.PHONY: quickstart train test coverage mutants lint docs clean

PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(shell $(p) -c 'import sys, venv; print("$(p)") if (3, 11) <= sys.version_info[:2] <= (3, 12) else None' 2>/dev/null | grep -v None)))
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

quickstart: $(VENV)/.ready  ## a real QLoRA run, offline, on two CPU cores: minutes, ends in a table
	$(BIN)/python -m medqlora.train experiment=quickstart

train: $(VENV)/.ready  ## the real job: Gemma-2B on MedMCQA; make train ARGS="quant=nf4 peft=lora_r16"
	$(BIN)/python -m medqlora.train $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

coverage: $(VENV)/.ready-dev  ## all tests, then the lines and branches of medqlora/ that they ran; fails below 90 % of branches
	mkdir -p build
	$(BIN)/python -m slipcover --json --out build/coverage.json -m pytest -n $(JOBS) --dist worksteal $(ARGS)
	$(BIN)/python -m slipcover --merge build/coverage.json --out build/merged.json
	$(BIN)/python -m tests.covered build/merged.json 90

mutants: $(VENV)/.ready-dev  ## changes scoring, packing and statistics a thousand times: does a test notice? Half an hour
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mutmut>=3.8'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.ready-docs  ## the documentation, into build/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed; found: $$(python3 --version 2>&1)" >&2; exit 1; }
	$(PYTHON) -m venv --upgrade-deps $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.ready

$(VENV)/.ready-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build dist
