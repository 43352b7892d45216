# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
#
# PYTHON: interpreter that the environment is made from. If it already has a PyTorch with a working GPU,
#         that one is used; otherwise the version pinned in constraints.txt is installed.
# VENV:   folder of the environment. Name an environment of your own to use that instead.
# ARGS:   passed on to the demo, pytest or the benchmark.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.freqopt-ready
CHECKED := $(VENV)/.freqopt-checked
DOCS_READY := $(VENV)/.freqopt-docs-ready
FOLDERS := freqopt passes kernels exporters models_zoo tests benchmarks examples
SOURCES := $(shell find $(FOLDERS) -name '*.py' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types pytest bench bench-all docs doctor release clean

help:
	@echo 'make demo    install, then calibrate, compile and sample a video; writes demo/report.html'
	@echo 'make test    install, then lint, types and tests'
	@echo 'make check   lint, types and a quick look at every room, in two minutes'
	@echo 'make lint    ruff check and ruff format --check'
	@echo 'make types   mypy, strict'
	@echo 'make pytest  the tests alone; ARGS="-m slow" for the long ones'
	@echo 'make bench   time the op against dense attention (needs an NVIDIA GPU)'
	@echo 'make bench-all  every result file, and the pages made of them; says what it leaves out'
	@echo 'make docs    the documentation as a site in build/site; a broken link fails'
	@echo 'make doctor  what works on this machine, and why the rest does not'
	@echo 'make release build what would be released and check it; uploads nothing'
	@echo 'make clean   remove caches, build output and the demo (not $(VENV))'
	@echo
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) ARGS=...'

$(READY): pyproject.toml constraints.txt .ci/make_venv.py
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo 'make: there is no $(PYTHON) here: install Python 3.10 or newer, or name it: make PYTHON=...'; \
	  exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is $$('$(PYTHON)' --version 2>&1) and freqopt needs 3.10 or newer:" \
	    "install one and name it: make PYTHON=python3.12"; \
	  exit 1; }
	@'$(PYTHON)' .ci/make_venv.py '$(VENV)'
	@touch $@

# Threads spin for some 20 microseconds and then sleep: the split is a thousand short steps, to which
# waking a thread each time adds as much again, and long spins take cores from what else runs there.
demo: $(READY)
	GOMP_SPINCOUNT=10000 '$(BIN)/freqopt' demo $(ARGS)

test: $(CHECKED) pytest

$(CHECKED): $(READY) $(SOURCES)
	@$(MAKE) --no-print-directory lint types
	@touch $@

check: $(CHECKED)
	OMP_NUM_THREADS=1 '$(BIN)/python' -m pytest -q -m smoke $(ARGS)

lint: $(READY)
	'$(BIN)/ruff' check .
	'$(BIN)/ruff' format --check .

types: $(READY)
	'$(BIN)/mypy' -p freqopt

# One thread per worker: two workers with two threads each fight over two cores.
# Each begins with a half of its own, as most modules share something: models, compiled kernels, processes.
pytest: $(READY)
	OMP_NUM_THREADS=1 '$(BIN)/python' -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(READY)
	'$(BIN)/python' -m benchmarks.attention $(ARGS)

bench-all: $(READY)
	'$(BIN)/python' -m benchmarks.everything $(ARGS)

$(DOCS_READY): $(READY)
	'$(BIN)/python' -m pip install -qq --disable-pip-version-check -c constraints.txt \
	  mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

docs: $(DOCS_READY)
	'$(BIN)/python' -m benchmarks.docs --check
	NO_MKDOCS_2_WARNING=1 '$(BIN)/python' -m mkdocs build --strict

doctor: $(READY)
	'$(BIN)/freqopt' doctor

release: $(READY)
	'$(BIN)/python' .ci/release.py

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	rm -f '$(CHECKED)'
	find $(FOLDERS) -name __pycache__ -type d -prune -exec rm -rf {} +
