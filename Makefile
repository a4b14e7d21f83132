# Every target works on a fresh machine with Python 3.11, a C compiler and a package index.
# uv is used when it is here and is put into .venv when it is not.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
CLI := .venv/bin/sglang-dflash
STAMP := .venv/.installed
# What `make serve ARGS="--port 8000"` and the others pass on.
ARGS ?=
# MINUTES=... sets the time limit of a benchmark or the length of `make soak`.

export HF_HUB_OFFLINE := 1
# Where it is set, every server start compiles SGLang's and torch's thousands of modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo serve bench bench-load bench-off soak thousand readme fetch test test-full test-widths lint format lock clean

help:  ## what can be made here
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /  make \1|/' | column -t -s '|'

install: $(STAMP)  ## .venv with everything at the locked versions

$(STAMP): requirements.lock requirements-reference.lock pyproject.toml
	@if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then \
	  uv=uv; [ -x $(PY) ] || uv venv -q --python 3.11 .venv; \
	else \
	  [ -n "$(PYTHON)" ] || { echo "error: no python3 here; install Python 3.11" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	    || { echo "error: $(PYTHON) is not Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  [ -x $(PY) ] || $(PYTHON) -m venv .venv; \
	  [ -x .venv/bin/uv ] || $(PY) -m pip install -q --disable-pip-version-check 'uv>=0.9'; \
	  uv=.venv/bin/uv; \
	fi; \
	$$uv pip install -p .venv --require-hashes -r requirements.lock; \
	$$uv pip install -p .venv -q --no-deps --require-hashes -r requirements-reference.lock; \
	$$uv pip install -p .venv -q --no-deps -e .
# Once, with both cores, what every server imports: else the processes of the first one all do it at once.
	@cd .venv/lib/python3.11/site-packages && \
	  ../../../bin/python -m compileall -q -j 0 -x 'torch/testing|torch/_inductor/kernel|transformers/models/' \
	  sglang/srt torch transformers || true
	@touch $@

fetch: $(STAMP)  ## the embedded target model, into the user's cache
	@$(CLI) fetch smollm2 >/dev/null

demo: fetch  ## plain server, then draft trees, same prompts, one table
	$(CLI) demo $(ARGS)

serve: fetch  ## an OpenAI-compatible server with draft trees
	$(CLI) serve $(ARGS)

bench: MINUTES ?= 90
bench: fetch  ## plain, chain, fixed widths and auto at 1 to 32 in flight (90 minutes)
	$(PY) benchmarks/serving.py --minutes $(MINUTES) $(ARGS)

bench-load: MINUTES ?= 45
bench-load: fetch  ## the same while the load changes (45 minutes)
	$(PY) benchmarks/changing_load.py --minutes $(MINUTES) $(ARGS)

bench-off: MINUTES ?= 40
bench-off: fetch  ## what auto costs where drafting never pays (40 minutes)
	$(PY) benchmarks/never_pays.py --minutes $(MINUTES) $(ARGS)

soak: MINUTES ?= 30
soak: fetch  ## everything at once for 30 minutes, every answer compared with plain decoding
	$(PY) benchmarks/soak.py --minutes $(MINUTES) $(ARGS)

thousand: fetch  ## 1,000 prompts through plain decoding and trees in float32 (10 minutes)
	$(PY) benchmarks/thousand.py $(ARGS)

readme:  ## put what make demo and the benchmarks measured into README.md and docs/benchmarks.md
	$(PY) benchmarks/readme.py

# Two processes (lanes: tests/conftest.py) of one thread, as they share two cores with the servers they start.
# One where less than the 15 GB is free that two take.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest tests -n auto --no-loadscope-reorder

test: fetch  ## everything meant to run in 25 minutes on two quiet cores
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-full: fetch  ## all tests; those for a GPU skip where there is none
	$(PYTEST) $(ARGS)

test-widths: fetch  ## served outputs once more, every step at another width
	DFLASH_TEST_WIDTH=random:1 $(PYTEST) -m "server and not gpu" $(ARGS)

lint: $(STAMP)  ## formatting, style and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: $(STAMP)  ## format and fix in place
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# SGLang has wheels for manylinux_2_34; the lock names no index, so it works with anyone's.
lock:  ## resolve requirements.lock again
	uv pip compile pyproject.toml --extra train --extra dev --generate-hashes --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_34 --no-header --no-annotate -q -o requirements.lock

clean:  ## remove what was made here, .venv and out/ included
	rm -rf .venv out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
