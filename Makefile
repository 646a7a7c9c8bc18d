# make demo   train, compress, prove and sample a small model (three minutes after installation)
# make test   lint and test
# PYTHON names the interpreter that makes .venv; PIP_ARGS goes to pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/golfgpt demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first: what depends on it then finds it installed. The marker is newer than what it installs from.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
