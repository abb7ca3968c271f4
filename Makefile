# Two commands are enough on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

GOOD := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c '$(GOOD)' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test test-system test-slow lint format tables docs clean

demo: .venv/installed  ## the main job on the bundled models, in minutes
	$(BIN)/python -m marval demo --out demo-out

test: .venv/installed-dev  ## the default suite
	$(BIN)/python -m pytest -n $(WORKERS) -q

test-system: .venv/installed-dev  ## of it only what needs Fashion-MNIST's 60,000 images or Chromium
	$(BIN)/python -m pytest -n $(WORKERS) -q -m "system and not slow"

test-slow: .venv/installed-dev  ## the checks that take minutes
	$(BIN)/python -m pytest -m slow -q

lint: .venv/installed-dev  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check src tests tools examples
	$(BIN)/ruff check src tests tools examples
	$(BIN)/python -m mypy

format: .venv/installed-dev
	$(BIN)/ruff format src tests tools examples
	$(BIN)/ruff check --fix src tests tools examples

tables: .venv/installed  ## fill the tables of README and docs/ from results/
	$(BIN)/python tools/tables.py README.md docs/results.md docs/full-size.md

docs: .venv/installed-docs  ## the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# pip's words go to a file: of an index that it cannot reach it says fifty lines. The path to src, which pip writes down,
# is then made relative: in a C locale Python 3.11 could not start if it held letters beyond ASCII.
define install
	@echo "Installing $(1) into .venv ..."
	@LC_ALL=C.UTF-8 $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt $(2) >.venv/pip.log 2>&1 || { \
		if grep -qE "connection broken by|Could not fetch URL" .venv/pip.log; \
		then echo "make: the package index cannot be reached: check the network, or pip's index-url and proxy"; \
		else tail -n 20 .venv/pip.log; fi >&2; exit 1; }
	@for file in .venv/lib/python*/site-packages/__editable__.marval-*.pth; do \
		test ! -f "$$file" || echo ../../../../src >"$$file"; done
endef

# The CPU build of torch: PyPI's own wheel would bring several GB of CUDA packages.
# (Where PyTorch's index cannot be reached, pip's configured sources are asked.) A comma between extras would end an
# argument of `call`.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer: install one, or name it: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(GOOD)' 2>/dev/null || { echo "make: $(PYTHON) is not a Python 3.11 or newer: make PYTHON=... names another" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -qqq --disable-pip-version-check --no-deps --retries 0 --timeout 30 \
		-c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null || true
	$(call install,torch (about 200 MB),--no-deps torch)
	$(call install,marval and what it needs,-e '.[serve]' -e '.[text]')
	@touch $@

.venv/installed-dev: .venv/installed
	$(call install,what the tests need,-e '.[dev]')
	@touch $@

.venv/installed-docs: .venv/installed
	$(call install,what the documentation needs,-e '.[docs]')
	@touch $@

clean:
	rm -rf .venv build demo-out
