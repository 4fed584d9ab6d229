# Set-up, demo and tests in one command each. Needs only Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: help demo docs explore studies test test-slow test-oldest check clean

help:
	@echo "make demo       set up and compare BAdam and BlockLLM with AdamW on a small, made-up SuperGLUE (minutes, offline)"
	@echo "make test       set up and run the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-oldest  the tests with the oldest torch and transformers (on Linux, downloads about 3 GB once)"
	@echo "make studies    the pages in docs/studies, from the records in studies/"
	@echo "make explore    the page docs/fit.html, of all built-in models (about twenty minutes of one core)"
	@echo "make docs       the documentation, in site/: generated pages, strict, links checked"
	@echo "make check      linter, types, tests"
	@echo "make clean      remove the environment and all caches (not the results in runs/)"

demo: $(VENV)/.installed
	$(BIN)/python -m membench compare --optimizers badam,blockllm --task superglue

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

test-slow: $(VENV)/.installed-slow
	$(BIN)/python -m pytest -n auto -m slow

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto

docs: $(VENV)/.installed-docs
	$(BIN)/python -m manual
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

explore: $(VENV)/.installed
	$(BIN)/python -m membench explore --out docs/fit.html

studies: $(VENV)/.installed
	$(BIN)/python -m studies

check: $(VENV)/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "membench needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.installed-slow: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,eval,ray,slurm]"
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,check]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE "^(huggingface_hub|torch|transformers)==" constraints.txt | cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
