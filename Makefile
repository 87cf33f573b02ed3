# The two targets a newcomer needs are `make demo` and `make test`; each installs what it needs the first time.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo screenshot test docs bench fuzz lint format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Erase the weapons from the embedded checkpoint and draw before and after: demo/grid.png
	$(BIN)/trce run training/demo.toml
	@cp demo/images/grid.png demo/grid.png && echo "Before and after: demo/grid.png"

screenshot: $(INSTALLED)  ## Draw docs/play.png: the page of `trce play`, as Chromium shows it
	$(BIN)/python -m training.screenshot

test: $(INSTALLED)  ## Run the tests (ARGS="-m slow" for those that take minutes, ARGS="tests/test_cli.py" for one file)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

docs: $(INSTALLED)  ## Build the site of docs/ in site/, strictly; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(INSTALLED)  ## Measure what each stage and other erasers erase and keep, and what attacks find (hours; ARGS="--rows map uce --count 40" for less)
	$(BIN)/python benchmarks/erasure.py $(ARGS)

# Of each kind of input so many; of the events of a command that is disturbed EVENTS, 0: all.
N ?= 10000
EVENTS ?= 0
SEED ?= 0

fuzz: $(INSTALLED)  ## Try N hostile inputs of each kind (10000), then disturb each command that writes at all events (hours)
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.run $(N) --seed $(SEED)
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.disturb $(EVENTS) --seed $(SEED)

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Bring the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and everything else that the targets above made
	rm -rf .venv demo site build dist .pytest_cache .mypy_cache .ruff_cache

# The stamp is newer than what it depends on, so that nothing is installed twice.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("trce needs Python 3.11 or later; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (once, a few minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,play]"
	@touch $@
