# What can be done here; `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help setup book test run bench lab clean
PARAMS ?= params/nano.yaml
DEVICE ?= cpu
BIN := .venv/bin

help:
	@echo "make book   set up, run $(PARAMS), build the book: build/book/_build/html/index.html"
	@echo "make test   set up, run every test"
	@echo "make run    set up, run PARAMS=$(PARAMS), or what is left of it"
	@echo "make bench  set up, measure speed on this machine against other trainers; DEVICE=cuda on a GPU"
	@echo "make lab    set up, open JupyterLab on the chapters"
	@echo "make clean  remove what was built and the local run (not .venv, not results/nano-full)"

setup: .venv/.ready

# one environment, every version pinned; made again when what it is made of changes
.venv/.ready: settings.ini setup.py constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "Python 3.11 or newer is needed; python3 is $$(python3 --version)"; exit 2; }
	@echo "setting up .venv (about 220 packages, 2 GB, some minutes)"
	@python3 -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

run: setup
	@$(BIN)/neurocodec run $(PARAMS)

book: run
	@$(BIN)/neurocodec book

test: setup
	@$(BIN)/ruff check neurocodec tests setup.py
	@$(BIN)/python -m pytest

# other trainers pin other versions than we do: an environment of their own
.venv-bench/.ready:
	@echo "setting up .venv-bench (sae-lens, sparsify)"
	@python3 -m venv .venv-bench
	@.venv-bench/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3
	@touch $@

# for our own kernels, beside our own environment (sparsify would take it up on a CPU too, where it cannot run);
# a CUDA build of torch brings the Triton it was built with
.venv-bench/triton/.ready: | setup
	@mkdir -p $(@D)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==3.9.0 \
		|| echo "no Triton for this machine: its kernels will not be compared"
	@touch $@

bench: setup .venv-bench/.ready .venv-bench/triton/.ready
	@$(BIN)/python benchmarks/interop.py --peers .venv-bench/bin/python
	@$(BIN)/python benchmarks/sae_step.py --peers .venv-bench/bin/python --device $(DEVICE)
	@$(BIN)/python benchmarks/kernels.py --triton .venv-bench/triton
	@test ! -d results/nano/02_text || $(BIN)/python benchmarks/quality.py --peers .venv-bench/bin/python
	@$(BIN)/python benchmarks/page.py

lab: setup
	@$(BIN)/jupyter lab --notebook-dir nbs --ip 127.0.0.1

clean:
	rm -rf build results/nano .snakemake .pytest_cache .ruff_cache .hypothesis
	find neurocodec nbs tests -name __pycache__ -prune -exec rm -rf {} +
