# Commands people type; the logic is in the package. `make` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCHYARD := $(BIN)/torchyard
# What the commands need from the system, by Debian's names; installed only where that is allowed.
SYSTEM := python3-venv mmdebstrap

.DEFAULT_GOAL := help

.PHONY: help
help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

$(STAMP): pyproject.toml hatch_build.py $(wildcard builder/native/*.[ch]) | system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "torchyard needs Python 3.11 or newer; name one: make PYTHON=python3.12 setup" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PHONY: setup
setup: $(STAMP) ## make .venv with the command line in it

.PHONY: command
command: | system ## make .venv with the command line alone, without what is for developers
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .

.PHONY: system
system:
	@command -v dpkg-query >/dev/null || exit 0; \
	for package in $(SYSTEM); do \
	    dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' && continue; \
	    if [ "$$(id -u)" = 0 ]; then \
	        apt-get install -qq -y $$package >/dev/null 2>&1 \
	            || { apt-get update -qq && apt-get install -qq -y $$package >/dev/null; }; \
	    else \
	        echo "note: $$package is not installed; if it is needed: sudo apt-get install $$package" >&2; \
	    fi; \
	done

.PHONY: build-all
build-all: setup ## build every image of matrix.yaml, and prove it by its bytes; needs no container engine
	@$(TORCHYARD) build --all

.PHONY: load-all
load-all: setup ## load every image into the container engine, one after another, and prove it in a container
	@$(TORCHYARD) load --all

.PHONY: validate-all
validate-all: setup ## validate every image in a container, without a GPU; reports in reports/
	@$(TORCHYARD) validate --all

.PHONY: test
test: test-fast test-tools test-builds test-variants ## run all tests; what needs an engine says so where there is none

.PHONY: test-fast
test-fast: setup ## run the tests that need nothing but Python, on every core
	@$(BIN)/python -m pytest -q -n auto tests/unit tests/architecture

.PHONY: test-tools
test-tools: setup ## run those with Debian's packages, registries and a browser, but no engine
	@$(BIN)/python -m pytest -q -m 'not engine and not release' tests/integration

.PHONY: test-builds
test-builds: setup ## run those that build and validate images with a container engine
	@$(BIN)/python -m pytest -q -m 'engine and not variant and not release' tests/integration

.PHONY: test-variants
test-variants: setup ## run those that start the images of the variants
	@TORCHYARD_TEST_REPOSITORY=torchyard-test-variants $(BIN)/python -m pytest -q -m 'variant and not release' tests/integration

.PHONY: bench
bench: setup ## compare with BuildKit on one CUDA cell: half an hour, 60 GB of disk, a Docker engine; writes docs/bench/
	@$(BIN)/python -m bench --out docs/bench

.PHONY: bench-small
bench-small: setup ## the same on the CPU cell: minutes; fails on a wrong image, never on a time
	@$(BIN)/python -m bench --small --out build/bench

.PHONY: lint
lint: setup ## check style, types, Dockerfiles, shell scripts and workflows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint images/*/Dockerfile
	@$(BIN)/shellcheck $(wildcard .ci/*) $$(grep -l '^#!/bin/\(ba\)\?sh' images/*/programs/*)
	@$(BIN)/zizmor --offline --quiet .github/workflows
	@$(BIN)/check-jsonschema --schemafile docs/matrix.schema.json matrix.yaml >/dev/null
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml >/dev/null

.PHONY: format
format: setup ## write the code in the one format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: lock
lock: setup ## resolve every cell and write its lock
	@$(TORCHYARD) lock

.PHONY: render
render: setup ## write what is generated: images/, the table in README.md, the schemas in docs/
	@$(TORCHYARD) render
	@$(TORCHYARD) matrix --schema > docs/matrix.schema.json.new && mv docs/matrix.schema.json.new docs/matrix.schema.json
	@$(TORCHYARD) report schema > docs/report.schema.json.new && mv docs/report.schema.json.new docs/report.schema.json

.PHONY: check
check: setup ## fail if a lock is stale or a generated file is not what the matrix gives
	@$(TORCHYARD) lock --check
	@$(TORCHYARD) render --check
	@$(TORCHYARD) matrix --schema | diff -u docs/matrix.schema.json - \
	    || { echo "docs/matrix.schema.json is stale: make render" >&2; exit 4; }
	@$(TORCHYARD) report schema | diff -u docs/report.schema.json - \
	    || { echo "docs/report.schema.json is stale: make render" >&2; exit 4; }

.PHONY: clean
clean: ## remove what these commands made here (the store stays: it is in the user's cache directory)
	@rm -rf $(VENV) build .hypothesis .mypy_cache .pytest_cache .ruff_cache
