# Two commands need nothing but Python 3.11+, git and make:
#   make demo    see the method work on this machine
#   make test    lint, then the whole suite
# and one that takes minutes:
#   make configs compile the step of every file in configs/ for a TPU, at the size of the tiny model
# The environment is made once; for another interpreter: make clean && PYTHON=python3.12 make test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint configs figures docs wheel clean

demo: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/python -m napo_jax.demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

configs: $(VENV)/.installed-for-tests
	$(BIN)/python tests/plan_configs.py configs/*.py

figures: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/python docs/figures/loss_shape.py

# The pages as a site, in build/site: open index.html there. `$(BIN)/mkdocs serve` shows changes as they are made.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/python docs/tools/config_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check build
	rm -rf dist && $(BIN)/python -m build

# Stamps are written last, so that an interrupted installation is done again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-for-tests: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,plan]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
