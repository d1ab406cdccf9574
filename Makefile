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

.PHONY: help quickstart test lint types check check-quick clean

help:
	@echo 'make quickstart   train a small Qwen2.5 model on real text and let it speak (about 5 minutes on 2 cores)'
	@echo 'make test         lint, type-check and run the tests'
	@echo 'make check-quick  the laws that break first, in under five minutes: for daily work'
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

# One part of each room of the house: model, cache, kernels, tokenizer, inference, objective, step, conversion, imports.
QUICK := tests/test_imports.py tests/qwen_jax/test_config.py tests/qwen_jax/test_hub.py tests/qwen_jax/attention \
	tests/qwen_jax/kernels/test_select.py tests/qwen_jax/inference/test_sampling.py tests/qwen_jax/tokenizer/test_chat_template.py \
	tests/qwen_jax/test_moe_dispatch.py tests/train/test_optimizer.py tests/train/test_objective.py tests/train/test_fields.py \
	tests/train/test_files.py tests/train/test_lock.py tests/train/observe tests/convert/test_verify.py

check-quick: $(DEV_VENV)/.installed
	$(DEV_VENV)/bin/python -m pytest -n auto --maxprocesses 4 $(QUICK) $(ARGS)

test: lint types check

clean:
	rm -rf $(RUN_VENV) $(DEV_VENV) build *.egg-info
