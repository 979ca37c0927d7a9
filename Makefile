# Everything runs in .venv, which each target makes first if it is missing or older than the pinned dependencies.
PYTHON ?= python3
VENV := .venv
JLT_HOME ?= quickstart
# One process of tests for each core, each with whole files; the order is that of tests/conftest.py.
TESTS := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test lint docs gpu clean

quickstart: $(VENV)/.runtime
	$(VENV)/bin/jlt quickstart --out $(JLT_HOME)

test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The site in site/, from packages alone; of the sources only the page of jlt explain is imported.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/mkdocs build --strict --quiet
	@echo "Open site/index.html"

# Everything that needs a GPU; GPU=--small tries it on a CPU.
gpu: $(VENV)/.runtime
	$(VENV)/bin/python scripts/gpu.py $(GPU)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'JLT needs Python 3.11 or newer; name one with PYTHON=, as in: make PYTHON=python3.12 quickstart'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# The tests compare Inception with this one's; without its dependencies, since torchvision is among them.
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch-fidelity==0.3.0
	touch $@ $(VENV)/.runtime

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist
