# make demo    everything in one go, on bundled real reviews: train, annotate on Ray and Spark, ask in SQL
# make setup   only the environment: .venv from constraints.txt, Java for Spark
# make test    all tests (FAST=1: without the slow ones; ARGS="-k lake": any pytest arguments)
# make lint    ruff, the directions of imports, types
# make bench   the measured comparison with other libraries (installs them first)
# make quality the model's accuracy on full data sets (data sets: benchmarks/DATA.md)
# make pretrain-proof  what pretraining here brings; ZeRO's memory, equal losses and gradients (data sets: benchmarks/DATA.md)
# make clean   takes back what the others made: .venv, demo_output, caches

PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench quality pretrain-proof clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup:
	@scripts/setup.sh dev

demo: setup
	@$(PY) jobs/demo/demo.py

test: setup
	@$(PY) -m pytest -n 2 $(if $(FAST),-m "not slow") $(ARGS)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@.venv/bin/lint-imports
	@$(PY) -m mypy

format: setup
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: setup
	@scripts/setup.sh bench
	@$(PY) benchmarks/annotate.py $(ARGS)
	@$(PY) benchmarks/train.py
	@$(PY) benchmarks/tasks.py

quality: setup
	@scripts/setup.sh bench
	@$(PY) benchmarks/quality.py $(ARGS)

pretrain-proof: setup
	@$(PY) benchmarks/gradients.py
	@$(PY) benchmarks/zero.py
	@$(PY) -m pytest -q tests/integration/test_train_zero.py tests/integration/test_pretrain_elastic.py \
		tests/unit/training/test_pretraining.py
	@$(PY) benchmarks/pretrain_proof.py $(ARGS)

clean:
	rm -rf .venv demo_output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
