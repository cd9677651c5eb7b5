# The front door. `make` lists what there is.
.DEFAULT_GOAL := help
.PHONY: help setup demo up down status test lint format bench bench-training bench-compression bench-serving clean
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)

help:  ## List what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Make .venv from the lock, install the system programs that are missing
	@infra/setup.sh

demo: setup  ## From nothing to a promoted model behind the gateway, then a bad model rolled back
	@$(PY) -m slipway.demo

up: setup  ## Start the local stack: gateway, Redis, Prometheus, Alertmanager, MLflow, Airflow
	@$(PY) -m slipway.platforms.local up

down:  ## End every process that `make up` began, and nothing else
	@if [ -x $(PY) ]; then $(PY) -m slipway.platforms.local down; fi

status:  ## Show what runs, where, since when
	@$(PY) -m slipway.platforms.local status

test: setup  ## The whole suite
	@$(PY) -m pytest

lint: setup  ## ruff, mypy --strict, the layers of the library
	@ruff check . && ruff format --check . && mypy && lint-imports

format: setup  ## Format the code
	@ruff check --fix . && ruff format .

bench: up  ## Every benchmark, about 20 minutes; VIDEO_GAMES=, IMAGES= add what needs them
	@for claim in ingest serving verdicts path $(if $(VIDEO_GAMES),"ranker $(VIDEO_GAMES)") \
		$(if $(IMAGES),"decoding $(IMAGES)"); do \
		set -- $$claim; name=$$1; shift; echo "== $$name"; $(PY) -m benchmarks.$$name "$$@" || exit 1; done

bench-training: setup  ## Training at depth, about an hour; VIDEO_GAMES=, IMAGES=, RECTOOLS= add what needs them
	@$(PY) -m benchmarks.training $(if $(VIDEO_GAMES),--video-games $(VIDEO_GAMES)) $(if $(IMAGES),--images $(IMAGES)) \
		$(if $(RECTOOLS),--rectools $(RECTOOLS))

bench-compression: setup  ## Recipes against FP32 in one engine; CLASSIFIER= and RANKER= are workspaces behind compress
	@$(PY) -m benchmarks.compression $(if $(CLASSIFIER),--classifier $(CLASSIFIER)) $(if $(RANKER),--ranker $(RANKER)) \
		--json benchmarks/results/compression.json

bench-serving: setup  ## The model server beside mosec, LitServe and BentoML, which come from PyPI, and under load; cache; state; rotation; scaling; the case
	@$(PY) -m benchmarks.serving --install --json benchmarks/results/serving.json
	@$(PY) -m benchmarks.cache $(if $(VIDEO_GAMES),--video-games $(VIDEO_GAMES)) --json benchmarks/results/cache.json
	@$(PY) -m benchmarks.state --json benchmarks/results/state.json
	@$(PY) -m benchmarks.rotation --json benchmarks/results/rotation.json
	@$(PY) -m benchmarks.scaling --json benchmarks/results/scaling.json
	@$(PY) -m benchmarks.serving.case --json benchmarks/results/case.json --plot docs/images/case.png

clean: down  ## Remove all state of this checkout: data, models, runs, the stack's databases
	@rm -rf .slipway data models reports .mypy_cache .ruff_cache .hypothesis .import_linter_cache
