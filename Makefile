# Two commands need nothing but Python 3.11+, git and make:
#   make demo    see the method work on this machine
#   make test    lint, then the whole suite
# PYTHON=python3.12 make test   uses another interpreter for the environment.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: demo test lint figures clean

demo: $(STAMP)
	$(BIN)/python examples/first_look.py

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/python docs/figures/loss_shape.py

# The stamp is written last, so that an interrupted installation is done again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
		"napo_jax needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: try PYTHON=python3.12 make ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,plan]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
