# Two commands are enough on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test test-slow lint format tables clean

demo: .venv/installed  ## the main job on the bundled models, in minutes
	$(BIN)/marval demo --out demo-out

test: .venv/installed-dev  ## the default suite
	$(BIN)/python -m pytest -n $(WORKERS) -q

test-slow: .venv/installed-dev  ## the checks that take minutes
	$(BIN)/python -m pytest -m slow -q

lint: .venv/installed-dev  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

tables: .venv/installed  ## fill the tables of README and model cards, and docs/evidence.md, from results/
	$(BIN)/python -m marval.evidence README.md model_cards/*.md

# The CPU build of torch: PyPI's own wheel would bring several GB of CUDA packages.
# (Where PyTorch's index cannot be reached, pip's configured sources are asked.)
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --retries 0 --timeout 30 -c constraints.txt \
		--index-url https://download.pytorch.org/whl/cpu torch \
		|| $(BIN)/pip install --quiet --no-deps -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[serve]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo-out
