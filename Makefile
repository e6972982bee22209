# Two commands for a fresh clone: `make demo` and `make test`. Both need python3 and pip, and make .venv first.
#
#   make demo     install, then read a document longer than the cache and answer questions about it
#   make test     install, then run the tests             make test PYTEST="-k config"   some of them
#   make test-floors     tests that touch every dependency, at the lowest versions allowed, in $(VENV)/floors
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

LOWEST_VERSIONS := grep -ohE '"[A-Za-z0-9_-]+>=[0-9.]+' $(PROJECTS) | tr -d '"' | grep -v ^setuptools | sed 's/>=/==/' | sort -u
FLOOR_PACKAGES := pytest pytest-asyncio pytest-xdist filelock hypothesis psutil openai anthropic peft compressed-tensors \
	llama-index-llms-openai-like \
	langchain langchain-tests langgraph-checkpoint-sqlite
FLOOR_TESTS := tests/cpu/test_decode_kernels.py tests/engine/test_engine.py tests/language/test_chat_template.py \
	tests/language/test_json_schema.py tests/models/test_checkpoints.py tests/models/test_gguf*.py tests/models/test_hub.py \
	tests/models/test_loader.py tests/models/test_torchao_settings.py tests/retrieval/test_passage_index.py \
	tests/sessions/test_file_format.py tests/server/test_anthropic.py tests/server/test_openai.py tests/cli \
	tests/server/test_llamaindex_openai_like.py \
	$(addprefix integrations/langchain-zsmerge/tests/test_langchain_,\
		chat.py llm.py schemas.py standard_unit.py structured.py tools.py) \
	$(addprefix integrations/llama-index-llms-zsmerge/tests/test_llamaindex_,\
		agents.py documents.py llm.py messages.py schemas.py tools.py)

.PHONY: help demo test test-floors lint docs build clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/zsmerge-llm demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST)

test-floors: $(VENV)/.installed-floors
	$(VENV)/floors/bin/python -m pytest $(FLOOR_TESTS) $(PYTEST)

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

# Every direct dependency at its lowest version, what these need at the newest. TORCH stays whichever build it names.
# Not deepagents and MCP, which are for tests only: they need newer versions of the others.
# Not setuptools, which is for builds: llama-index-core needs a newer one.
$(VENV)/.installed-floors: $(PROJECTS)
	@echo "Installing the lowest versions of all dependencies into $(VENV)/floors"
	$(PYTHON) -m venv --clear $(VENV)/floors
	$(if $(TORCH),$(VENV)/floors/bin/pip install --quiet $(TORCH))
	$(LOWEST_VERSIONS) $(if $(TORCH),| grep -v '^torch==') > $(VENV)/floors/constraints.txt
	$(VENV)/floors/bin/pip install --quiet -c $(VENV)/floors/constraints.txt -e ".[server,bnb,torchao]" $(EDITABLE) \
		$(FLOOR_PACKAGES)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/pip
	@echo "Installing the documentation tools into $(VENV)"
	$(BIN)/pip install --quiet -e ".[docs]"
	@touch $@
