# Needs Python 3.11 and make; everything else goes into .venv.

PYTHON ?= $(or $(shell command -v python3.11),python3)
RUN := .venv/bin/python -m

.PHONY: train test test-slow lint bench docs clean .venv

## train: the quick start; a minute or so on two cores
train: .venv
	$(RUN) convmixer_jax.main --config configs/digits.py --workdir runs/digits

## test: all but the tests that take minutes; eight minutes on two cores
test: .venv/dev
	$(RUN) pytest -m "not slow" --numprocesses=2 --dist=loadscope

## test-slow: accuracies, and what needs CIFAR-10
test-slow: .venv/dev
	$(RUN) pytest -m slow

lint: .venv/dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

## bench: speed beside PyTorch's; half an hour on two idle cores
bench: .venv/dev
	$(RUN) benchmarks.table --out benchmarks/results/throughput.json

## .venv: sets up and does nothing else
.venv: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: Python 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(RUN) pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/ready
	$(RUN) pip install --disable-pip-version-check -r requirements-dev.txt
# The compiler for TPUs, of jax 0.10.2, for the tests of plan. Apart, since every
# process that finds it loads it; not made for all systems.
	-$(RUN) pip install --disable-pip-version-check --no-deps --upgrade --target .venv/libtpu libtpu==0.0.42.1
	@touch $@

## docs: writes docs/config.md from convmixer_jax/config.py
docs: .venv
	.venv/bin/python -c "from convmixer_jax import config; print(config.markdown(), end='')" > docs/config.md

clean:
	rm -rf .venv
