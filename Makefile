# Everything a person does here, each doing all its own set-up. `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help run test cover check audit sbom fuzz chaos format lock bench growth limits holds clean
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LOCKED := --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet
LOCK := $(BIN)/uv pip compile pyproject.toml $(LOCKED)
# Keeps both cores busy: beside it nothing that waits for a process passes in time.
CHAOS := tests/live/test_chaos.py
# What tries few examples in make test, always the same, and many new ones in make fuzz.
FUZZED := tests/unit/test_secret.py tests/http/test_forged_tokens.py \
  tests/http/test_hostile_headers.py tests/http/test_hostile_bodies.py
LOCK_BENCH := $(BIN)/uv pip compile --group pyproject.toml:bench $(LOCKED)
LOCK_SUPPLY := $(BIN)/uv pip compile --group pyproject.toml:supply $(LOCKED)
LOCKS := requirements requirements-dev requirements-bench requirements-supply

help: ## List what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: .venv/run ## Serve on http://127.0.0.1:8000 with demo accounts
	@exec $(BIN)/rolecall serve --demo

test: .venv/dev ## Every test, on real Redis, SQLite and PostgreSQL
	$(BIN)/python -m pytest -q -n 2 tests/unit tests/http
	$(BIN)/python -m pytest -q -n 2 tests/live --ignore $(CHAOS)
	$(BIN)/python -m pytest -q $(CHAOS)

# Apart from `test`: Python 3.11 calls the tracer on every line of every library too, which takes
# longer than the tests themselves.
cover: .venv/dev ## The lines and branches that no unit or http test reaches (3 minutes)
	$(BIN)/python -m pytest -q -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=87 tests/unit tests/http

check: .venv/dev ## Lint, types, and whether the locks are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for lock in $(LOCKS); do \
	  cp $$lock.lock .venv/$$lock.lock; done
	@$(LOCK) --group build -o .venv/requirements.lock
	@$(LOCK) --group build --group dev -o .venv/requirements-dev.lock
	@$(LOCK_BENCH) -o .venv/requirements-bench.lock
	@$(LOCK_SUPPLY) -o .venv/requirements-supply.lock
	@for lock in $(LOCKS); do \
	  diff -q $$lock.lock .venv/$$lock.lock || { echo "$$lock.lock is out of date: make lock"; exit 1; }; done
	@echo "The locks are current."

format: .venv/dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/dev ## Bring the locks up to date with pyproject.toml
	$(LOCK) --group build -o requirements.lock
	$(LOCK) --group build --group dev -o requirements-dev.lock
	$(LOCK_BENCH) -o requirements-bench.lock
	$(LOCK_SUPPLY) -o requirements-supply.lock

fuzz: .venv/dev ## Forged tokens, odd input, and the service against its own document, at length (20 minutes)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 $(FUZZED)
	FUZZ_EXAMPLES=200 $(BIN)/python -m pytest -q -p no:cacheprovider tests/live/test_document.py

chaos: .venv/dev ## Every fault under load, on both databases, as tables (20 minutes)
	@$(BIN)/python -m tests.live._chaos_all

bench: .venv/dev .venv/bench ## Rolecall beside its peers, as tables (15 minutes)
	$(BIN)/python -m benchmarks.run

growth: .venv/dev ## One and ten million revocations, a million users, changes of a million (40 minutes)
	$(BIN)/python -m benchmarks.blocklist 1000000
	$(BIN)/python -m benchmarks.blocklist 10000000
	$(BIN)/python -m benchmarks.users
	$(BIN)/python -m benchmarks.many

audit: .venv/supply ## Known vulnerabilities in what runs (asks the public advisory database)
	@.venv/supply/bin/pip-audit --strict --progress-spinner off --require-hashes --disable-pip --requirement requirements.lock || \
	  { echo "Either there are advisories above, or their database could not be asked: nothing was audited then."; exit 1; }

sbom: .venv/supply ## What runs, as CycloneDX, in sbom.json
	.venv/supply/bin/cyclonedx-py requirements --output-reproducible --of JSON -o sbom.json requirements.lock

limits: .venv/dev ## Sign-ins beside bare argon2, in a storm; refreshes; 10,000 idle connections; remembered tokens (5 minutes)
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.remembered
	$(BIN)/python -m benchmarks.profile

holds: .venv/dev ## The longest that hostile requests of 64 KiB hold the event loop (1 minute)
	$(BIN)/python -m benchmarks.loop_holds

clean: ## Remove the virtual environment and caches; data is kept
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build

# The environment for running is made once per lock, and the one for tests on top of it. A lock
# is complete, so nothing is resolved anew: pip would look at what was published since.
.venv/run: requirements.lock pyproject.toml
	@test -f .venv/dev && test .venv/dev -nt requirements.lock && touch $@ || { \
	  $(MAKE) --no-print-directory .venv/python && \
	  echo "Installing the locked dependencies (about a minute, once) ..." && \
	  $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock && \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	  touch $@; }

.venv/dev: requirements-dev.lock pyproject.toml
	@$(MAKE) --no-print-directory .venv/python
	@echo "Installing the locked dependencies for tests (about a minute, once) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The peers have versions of their own of what Rolecall uses: nothing of theirs is in .venv.
.venv/bench: requirements-bench.lock
	@$(MAKE) --no-print-directory .venv/python
	@echo "Installing the peers (a minute, once) ..."
	@$(BIN)/python -m venv $@
	@$@/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-bench.lock
	@touch $@

# Tools that look at the locks from outside.
.venv/supply: requirements-supply.lock
	@$(MAKE) --no-print-directory .venv/python
	@$(BIN)/python -m venv $@
	@$@/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-supply.lock
	@touch $@

.PHONY: .venv/python
.venv/python:
	@test -x $(BIN)/python || { echo "Making the virtual environment .venv ..."; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Rolecall needs Python 3.11 or newer; set PYTHON=/path/to/it."; exit 1; }; \
	  $(PYTHON) -m venv .venv; }
