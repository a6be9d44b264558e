# The two commands a newcomer needs: `make sweep` and `make test`. Every target sets up .venv first when it must.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEARCH := $(VENV)/.search
RUNS ?= $(or $(TUNE_TOPKD_RUNS_DIR),runs)
SWEEP ?= digits

.PHONY: sweep test test-slow test-lowest coverage torture check format bench analysis docs clean

sweep: $(SEARCH)  ## search the digits space, or go on with an interrupted search
	@if [ -f $(RUNS)/digits/ledger.jsonl ]; then $(BIN)/python launch.py resume digits --runs-dir $(RUNS); \
	  else $(BIN)/python launch.py run --runs-dir $(RUNS); fi

test: $(STAMP)  ## the tests, those marked slow left out
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)  ## the tests marked slow
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: $(STAMP)  ## the tests, and which lines of the package they run in their own processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov tune_topkd --cov-report term:skip-covered $(ARGS)

test-lowest:  ## the tests with the oldest versions that pyproject.toml allows, in an environment of their own
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/lowest.txt --editable '.[sweep,dev]'
	.venv-lowest/bin/python -m pytest -W default -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)  # old libraries warn of new ones

torture: $(STAMP)  ## a hundred kills of whole sweeps, and of workers, nodes and heads (25 minutes); test-slow has a short form
	TUNE_TOPKD_TORTURE_KILLS=100 $(BIN)/python -m pytest -m slow tests/test_torture.py $(ARGS)

check: $(STAMP)  ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## what proves the speed: ratios, each with its baseline in the same run
	$(BIN)/python -m benchmarks --write $(ARGS)

analysis: $(STAMP)  ## the notebooks over a sweep as pages: make analysis SWEEP=digits
	TUNE_TOPKD_SWEEP=$(SWEEP) TUNE_TOPKD_RUNS_DIR=$(abspath $(RUNS)) $(BIN)/jupyter nbconvert --log-level ERROR \
	  --execute --no-input --to html --output-dir $(RUNS)/$(SWEEP) analysis/01-one-sweep.ipynb \
	  analysis/02-how-the-search-went.ipynb analysis/03-best-k.ipynb
	@echo "the answer:      $(RUNS)/$(SWEEP)/01-one-sweep.html"
	@echo "the search:      $(RUNS)/$(SWEEP)/02-how-the-search-went.html"
	@echo "K of all sweeps: $(RUNS)/$(SWEEP)/03-best-k.html"

docs: $(STAMP)  ## the docs as a site: build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet  # the theme's advice on another mkdocs is no warning
	@echo "the site: build/site/index.html (its search needs a server: $(BIN)/python -m mkdocs serve)"

clean:  ## remove what can be made again, but never the sweeps in runs/
	rm -rf $(VENV) .venv-lowest .coverage build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

$(SEARCH): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "Installing what a search needs into $(VENV) (once; some minutes, about 6 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[sweep]'
	@touch $@

$(STAMP): $(SEARCH)
	@echo "Installing what the tests, the notebooks and the docs need besides (once)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[sweep,cluster,dev,consumers,docs]'
	@touch $@
