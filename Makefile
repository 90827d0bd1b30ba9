# Two commands need nothing but Python 3.11+, git and make:
#   make demo    see the method work on this machine
#   make test    lint, then the whole suite
# The environment is made once; for another interpreter: make clean && PYTHON=python3.12 make test

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: demo test lint figures clean

demo: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python examples/first_look.py

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
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,plan]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
