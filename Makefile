# Every target makes the environment first; a current one costs a fraction of a second.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= Once upon a time

# Through the environment, so that quotes and dollar signs in a prompt reach the command as they are.
export FLASHCORE_PROMPT := $(value PROMPT)

.PHONY: env generate test test-all lint format

env:
	@$(PYTHON) scripts/setup_env.py "$(VENV)"

generate: env
	@"$(VENV)/bin/flashcore" generate --prompt "$$FLASHCORE_PROMPT"

test: env
	@"$(VENV)/bin/python" -m pytest

test-all: env
	@"$(VENV)/bin/python" -m pytest -m ""

lint: env
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@"$(VENV)/bin/mypy"

format: env
	@"$(VENV)/bin/ruff" check --fix .
	@"$(VENV)/bin/ruff" format .
