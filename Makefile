# Targets for developers. Everything is installed into .venv; a second call installs only what has changed.

# The interpreter for .venv (empty: deploy/venv.sh finds one).
PYTHON ?=
PORT ?= 8000
ONCE ?=
# The connector of the demo's engines: nixl, mooncake_ascend, nixl_push, sglang.
CONNECTOR ?= nixl
# The version whose notes `make release-notes` prints (empty: the newest).
VERSION ?=
# Seconds for which `make soak` runs.
SECONDS ?= 300
# The seed of the failures in `make soak` and of the examples in `make test-random` (empty: a new one, which is printed).
SEED ?=
# The coverage that `make coverage` requires, in per cent; measured 95.4. It may only rise. Not in CI: it takes nearly twice
# the CPU.
COVERAGE := 95
# Arguments for pytest (make test, make test-all, ...) and for the bench (make bench).
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
REAL_VENV := .venv-vllm
PYTEST := $(BIN)/pytest -n auto --dist loadgroup
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
RECIPE := pyproject.toml setup.py constraints.txt deploy/venv.sh
TYPED := proxy bench deploy
CHECKED := $(TYPED) docs tests setup.py

# tests/real/install.sh reads another PYTHON: vLLM's wheels decide that version, not this file.
unexport PYTHON
# Without compiled files, each process of the tests would compile all sources by itself.
unexport PYTHONDONTWRITEBYTECODE
export SEED
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-random test-real test-versions soak coverage lint types bench
.PHONY: constraints release-notes clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.11] [PORT=8000] [ONCE=1] [CONNECTOR=nixl] [ARGS='...']"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 16

# Without isolation the build uses the setuptools of constraints.txt and downloads no other.
# Editable, so proxy/ is on the path, and with it the simulator, which is a distribution of its own.
$(VENV)/.run: $(RECIPE)
	@PYTHON="$(PYTHON)" deploy/venv.sh $(VENV)
	@echo "installing pd-proxy into $(VENV)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.develop: $(VENV)/.run
	@echo "installing what tests and checks need into $(VENV)"
	@$(PIP) --no-build-isolation -e '.[test,dev]'
	@touch $@

install: $(VENV)/.develop ## make .venv with everything that the other targets need

demo: $(VENV)/.run ## stream a completion through the gateway and simulated pools; Ctrl-C ends it
	@exec $(BIN)/python deploy/demo.py --port $(PORT) --connector $(CONNECTOR) $(if $(filter-out 0,$(ONCE)),--once)

test: $(VENV)/.develop ## run the quick tests, of every part, with the same data each time
	$(PYTEST) -p no:schemathesis -m "not real and not slow" $(ARGS)

test-all: $(VENV)/.develop ## run every test that needs no real vLLM
	$(PYTEST) -m "not real" $(ARGS)

# One seed for all processes of pytest, printed first, so that a failure can be repeated.
test-random: $(VENV)/.develop ## run the property tests with new random examples (SEED=n repeats a run)
	@seed=$${SEED:-$$($(BIN)/python -c 'import random; print(random.SystemRandom().randrange(1 << 32))')}; \
	echo "random examples; to repeat them: make test-random SEED=$$seed"; \
	PROPERTIES=random exec $(PYTEST) -m "hypothesis and not real" --hypothesis-seed=$$seed $(ARGS)

test-real: $(VENV)/.develop ## run the tests against real vLLM engines on the CPU (installs 2.3 GB into .venv-vllm)
	bash tests/real/install.sh $(REAL_VENV)
	REQUIRE_REAL_VLLM=1 $(BIN)/pytest -m real tests/real $(ARGS)

test-versions: ## run the quick tests under every installed Python from 3.11, each in its own .venv-3.x
	deploy/test_versions.sh $(ARGS)

coverage: $(VENV)/.develop ## run the quick tests and show which lines of the gateway they reach; fails below COVERAGE per cent
	$(PYTEST) -p no:schemathesis -m "not real and not slow" --cov --cov-report=term:skip-covered \
	  --cov-fail-under=$(COVERAGE) $(ARGS)

soak: test-random ## random examples, then requests for SECONDS while engines are stopped at random (SEED=n repeats both)
	SOAK_SECONDS=$(SECONDS) SOAK_SEED=$(SEED) $(BIN)/pytest -s tests/faults/test_soak.py $(ARGS)

lint: $(VENV)/.develop ## check style and format
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/.develop ## check types, strictly
	$(BIN)/mypy --explicit-package-bases $(TYPED)

bench: $(VENV)/.develop ## measure the gateway's cost beside nginx (needs gcc and nginx; ARGS=--quick for a first look)
	$(BIN)/python -m bench $(ARGS)

release-notes: ## print the section of VERSION in CHANGELOG.md, or the newest one
	@$(or $(wildcard $(BIN)/python),python3) deploy/release_notes.py $(VERSION)

constraints: ## write constraints.txt again, with the newest versions that pyproject.toml allows
	PYTHON="$(PYTHON)" deploy/constraints.sh

clean: ## remove everything that these targets made, virtual environments included
	rm -rf $(VENV) $(VENV)-3.* $(REAL_VENV) .cache .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find proxy -name '*.egg-info' -prune -exec rm -rf {} +
	rm -rf proxy/pd_proxy_simulator/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
