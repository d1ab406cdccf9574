# The two commands of the README are `make quickstart` and `make test`. Each builds its own virtual environment.
PYTHON ?= python3
RUN_VENV := .venv
DEV_VENV := .venv-dev
# The lock is for the default Python (3.11); any other one resolves the ranges of pyproject.toml.
LOCKED := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))')
ifeq ($(LOCKED),1)
CONSTRAINT := -c constraints.txt
endif
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart test lint types check clean

help:
	@echo 'make quickstart   train a small Qwen2.5 model on real text and let it speak (about 5 minutes on 2 cores)'
	@echo 'make test         lint, type-check and run the tests'
	@echo 'make lint types check clean'

$(RUN_VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(RUN_VENV)
	$(RUN_VENV)/bin/python $(PIP) $(CONSTRAINT) -e .
	@touch $@

$(DEV_VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/python $(PIP) $(CONSTRAINT) -e '.[dev]'
	@touch $@

# transformers 4.57, beside the newest one, to prove that what we write loads in both. It shares torch with the dev environment.
$(DEV_VENV)/transformers4/.installed: $(DEV_VENV)/.installed
	$(DEV_VENV)/bin/python $(PIP) --target $(DEV_VENV)/transformers4 'transformers==4.57.1' 'tokenizers==0.22.1' 'huggingface-hub==0.36.0' --no-deps
	@touch $@

quickstart: $(RUN_VENV)/.installed
	$(RUN_VENV)/bin/qwen-jax quickstart $(ARGS)

lint: $(DEV_VENV)/.installed
	$(DEV_VENV)/bin/ruff check .
	$(DEV_VENV)/bin/ruff format --check .

types: $(DEV_VENV)/.installed
	$(DEV_VENV)/bin/mypy

check: $(DEV_VENV)/.installed $(DEV_VENV)/transformers4/.installed
	$(DEV_VENV)/bin/python -m pytest -n auto --maxprocesses 4 $(ARGS)

test: lint types check

clean:
	rm -rf $(RUN_VENV) $(DEV_VENV) build *.egg-info
