# Two commands for a fresh clone: `make demo` and `make test`. Both need python3 and pip, and make .venv first.
#
#   make demo     install, then read a document longer than the cache and answer questions about it
#   make test     install, then run the tests             make test PYTEST="-k config"   some of them
#   make lint     ruff, format check, mypy, hadolint                make docs    the site, in site/
#   make build    wheels and sdists, in dist/             make clean   delete .venv, site/ and dist/
#
# TORCH names a torch build to install first, such as TORCH="torch==2.13.0" or a path to a wheel. Without it pip takes
# its default, which on Linux is the build for CUDA; it runs on a CPU too.

PYTHON ?= python3
TORCH ?=
PYTEST ?=
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATIONS := integrations/langchain-zsmerge integrations/llama-index-llms-zsmerge
PROJECTS := pyproject.toml $(INTEGRATIONS:%=%/pyproject.toml)
EDITABLE := $(INTEGRATIONS:%=-e %)

.PHONY: help demo test lint docs build clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/zsmerge-llm demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

build: $(VENV)/.installed-dev
	for project in . $(INTEGRATIONS); do $(BIN)/python -m build --outdir dist $$project || exit 1; done

clean:
	rm -rf $(VENV) site dist build *.egg-info

# A stamp is renewed when a pyproject.toml changes; otherwise the commands start at once.
$(VENV)/bin/pip:
	@echo "Making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install --quiet $(TORCH))

$(VENV)/.installed: $(PROJECTS) | $(VENV)/bin/pip
	@echo "Installing zsmerge-llm and its integrations into $(VENV)"
	$(BIN)/pip install --quiet -e . $(EDITABLE)
	@touch $@

$(VENV)/.installed-dev: $(PROJECTS) | $(VENV)/bin/pip
	@echo "Installing zsmerge-llm, its integrations and the test tools into $(VENV)"
	$(BIN)/pip install --quiet -e ".[dev,server]" $(EDITABLE)
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/pip
	@echo "Installing the documentation tools into $(VENV)"
	$(BIN)/pip install --quiet -e ".[docs]"
	@touch $@
