# `make check` is what CI runs; `make gpu` needs a GPU.
PYTHON ?= python

.PHONY: check lint test slow gpu

check: lint test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	lint-imports

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m 'slow and not gpu'

gpu:
	$(PYTHON) benchmarks/gpu.py
