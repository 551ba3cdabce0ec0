# make demo   the whole DAG on real text, from a fresh clone
# make test   lint, types, import contracts and the fast suite, from a fresh clone
# make faults KILLS=2000 SEED=7   kill -9 of corpus builds at so many moments drawn from the seed
# make up     a Prefect server and a worker that stay, with every flow deployed; make down ends them (docs/operations.md)
# make ui     the Prefect UI over the runs that the store remembers, until Ctrl-C

PYTHON ?= python3
BIN := .venv/bin
SEQMILL := $(BIN)/seqmill
PIP := $(BIN)/pip --disable-pip-version-check install --constraint requirements.lock

# Processes that run tests, a file of them at a time.
JOBS ?= 2
KILLS ?= 300
SEED ?= 7

PORT ?= 4200

.PHONY: demo up down test lint types contracts suite slow faults resume-matrix ui screenshots lock clean

demo: .venv/.demo
	$(SEQMILL) demo-data data/demo
	$(SEQMILL) run demo

up: .venv/.demo
	$(SEQMILL) demo-data data/demo
	$(SEQMILL) up --port $(PORT)

down: .venv/.demo
	$(SEQMILL) down

test: lint types contracts suite

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

contracts: .venv/.dev
	$(BIN)/lint-imports

suite: .venv/.dev
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist loadfile

slow: .venv/.dev
	$(BIN)/pytest -m slow

faults: .venv/.dev
	$(BIN)/python -m tests.faults.kills --kills $(KILLS) --seed $(SEED)

# Every resume that is promised, a line a cell, some 20 minutes on two cores; stopped and started again, it does what is left.
resume-matrix: .venv/.dev
	$(BIN)/python -m tests.training.matrix .resume-matrix

# The pictures of docs/ui.md: two small recipes, a server on loopback, Debian's chromium; some three minutes.
screenshots: .venv/.dev
	$(BIN)/python -m docs.screenshots

ui: .venv/.demo
	$(SEQMILL) ui

.venv/bin/python:
	$(PYTHON) -m venv .venv

# On a terminal pip shows its own progress; elsewhere a line every 20 s says how far it is.
define install
@echo "installing $(1) into .venv (about 2 GB; a minute or two where the network is fast)"
@if [ -t 1 ]; then exec $(PIP) --editable '$(1)'; fi; \
	while sleep 2 && kill -0 $$$$ 2>/dev/null; do \
		n=$$((n + 1)); [ $$((n % 10)) -ne 0 ] || echo "installing: $$(du -sm .venv | cut -f1) MB after $$((n * 2)) s"; \
	done & \
	$(PIP) --quiet --editable '$(1)'; code=$$?; kill $$!; exit $$code
endef

.venv/.demo: pyproject.toml requirements.lock | .venv/bin/python
	$(call install,.[demo])
	@touch $@

.venv/.dev: pyproject.toml requirements.lock | .venv/bin/python
	$(call install,.[dev])
	@touch .venv/.demo $@

# What a fresh install of everything takes today; a local build's suffix (+cpu) is not part of a version to ask for.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet '.[dev]'
	.venv-lock/bin/pip freeze --exclude seqmill | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .resume-matrix
