# What developers and CI type; each target installs what it lacks.
SHELL := bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
CLUSTER ?= dev
MODEL ?= tiny
SOURCES := cli crds engine node_agent operator examples tests bench

.PHONY: help bench-quick demo test nightly lint format requirements images cluster-up cluster-down clean venv

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## from nothing to a job that trains inside a serving endpoint (CLUSTER=current: on the kubeconfig's cluster; MODEL=smollm2: a real model)
	@CLUSTER=$(CLUSTER) MODEL=$(MODEL) hack/demo

test: lint ## every test but the nightly ones
	hack/cluster install redis-server:redis-server
	hack/cluster build
	hack/test

nightly: venv ## the tests that are too long for every run
	hack/cluster install
	hack/cluster build
	$(BIN)/pytest -m nightly
	TRITON_INTERPRET=1 $(BIN)/pytest -m nightly tests/engine/interpreted

bench-quick: venv ## co-serving beside its peers on this machine: a short real replay, the rest simulated (10 minutes)
	PYTHONPATH=bench $(BIN)/python -m coserve --quick

lint: venv ## ruff, mypy, import-linter; warnings are errors
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## rewrite the sources in the common form
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

requirements: venv ## resolve requirements/*.txt anew from pyproject.toml
	hack/requirements

images: ## the images of operator and agent (the agent's holds torch: 4.5 GB)
	hack/cluster install
	hack/cluster images base redis operator agent

cluster-up: ## the development cluster
	hack/cluster install
	hack/cluster build
	hack/cluster up

cluster-down: ## end the development cluster, whatever state it is in
	hack/cluster down

clean: cluster-down ## also remove what was made in this checkout
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

venv:
	@hack/venv $(VENV)
