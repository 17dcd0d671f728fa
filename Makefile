# Needs Python 3.11, 3.12 or 3.13 and make; everything else goes into .venv.

PYTHON ?= $(or $(shell command -v python3.11),python3)
RUN := .venv/bin/python -m
PIP := $(RUN) pip install --disable-pip-version-check

.PHONY: train test test-slow lint bench docs clean .venv

## train: the quick start; a minute or so on two cores
train: .venv
	$(RUN) convmixer_jax.main --config configs/digits.py --workdir runs/digits

## test: the fast tests; about six minutes on two idle cores
test: .venv/dev
	$(RUN) pytest -m "not slow" --numprocesses=2 --dist=loadscope

## test-slow: the slow tests: accuracies, kills, and those that need CIFAR-10
test-slow: .venv/dev
	$(RUN) pytest -m slow
	XLA_FLAGS=--xla_backend_optimization_level=3 $(RUN) pytest -m "not slow" \
	  --numprocesses=2 --dist=loadscope \
	  $(addprefix tests/test_,$(addsuffix .py,augment models ops optim step train))

lint: .venv/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

## bench: speed beside PyTorch's; about an hour on two idle cores
bench: .venv/dev
	$(RUN) benchmarks.table --out benchmarks/results/throughput.json

## .venv: installs requirements.txt and runs nothing
.venv: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and f"error: {sys.executable} is Python {v[0]}.{v[1]}; choose 3.11, 3.12 or 3.13: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/ready
	$(PIP) -r requirements-dev.txt
# The TPU compiler that fits the jax of requirements.txt, for the tests of plan. It
# goes to a folder of its own, because jax loads it wherever it is importable. Some
# systems have no build of it: then those tests are skipped.
	-$(PIP) --no-deps --upgrade --target .venv/libtpu \
	  'libtpu==0.0.42.1; python_version < "3.12"' \
	  'libtpu==0.0.50.1; python_version >= "3.12"'
# XLA's compiler for GPUs, likewise.
	-$(PIP) --no-deps --upgrade --target .venv/cuda \
	  'jax-cuda12-pjrt==0.10.2; python_version < "3.12"' \
	  'jax-cuda12-pjrt==0.12.0.1; python_version >= "3.12"'
	@touch $@

## docs: writes docs/config.md from convmixer_jax/config.py
docs: .venv
	.venv/bin/python -c "from convmixer_jax import config; print(config.markdown(), end='')" > docs/config.md

clean:
	rm -rf .venv
