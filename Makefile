# make env | demo | test | test-cluster | lint | format | bench | study-<name> | chaos. Everything runs in .venv, which `make env` makes from envs/pins.txt.
SHELL := /bin/bash
BIN := .venv/bin
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: env demo test test-cluster lint format clean

env:
	@bash envs/make_env.sh

demo: env
	$(BIN)/snakemake --cores $(CORES) results/tables/robustness.md results/report.html --quiet rules
	@$(BIN)/python -m pipeline_lib demo

test: env lint
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

test-cluster: env
	$(BIN)/python -m tests.cluster

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .snakemake

# Figures and studies, committed as JSON; on a machine that does nothing else (docs/studies, benchmarks/README.md).
BENCHMARKS := planning startup sweep nano_training bitflip_step bitflip_cpu int2_cpu int2_block ternary_cpu optical_step
STUDIES := study-robustness study-kills study-defences study-flips study-int2 study-relora study-optical study-efficient-training

.PHONY: bench chaos $(STUDIES)

bench: env
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

$(STUDIES): study-%: env
	$(BIN)/python -m studies.$(subst -,_,$*)

chaos: env
	$(BIN)/python -m studies.chaos
