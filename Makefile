# `make demo` and `make test` set everything up by themselves: a virtual environment, the CPU build of PyTorch, the rest.
# Nothing is installed again while pyproject.toml and constraints.txt stay as they are.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

# PyTorch comes first, in the version the tests ran with, so that nothing else pulls in another build of it.
# On Linux the index's own is the CUDA build, 2 to 3 GB. `make demo TORCH_BUILD=cpu` takes the CPU build, and cu126, cu128, ...
# that of another CUDA version, from PyTorch's own index. TORCH="torch==VERSION" is another version.
TORCH ?= torch==2.13.0
TORCH_BUILD ?=
TORCH_FROM := $(if $(TORCH_BUILD),--index-url https://download.pytorch.org/whl/$(TORCH_BUILD))

FOLDERS := assets configs data_recipes evaluation models pruning scripts serving tiny_world train

export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test families docs dist lint types check setup clean

demo: $(VENV)/.installed ## dense, training-free, recalibrate, tuned, table (about 4 minutes on 2 cores)
	$(BIN)/prunetune demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev ## every test, with the slowest named
	$(BIN)/python -m pytest

families: $(VENV)/.installed-dev ## docs/families.md, from a run of the identity suite of every family
	$(BIN)/python -m pytest -q -p prunetune.testing.report --families-report build/families.json tests
	$(BIN)/python -m prunetune.scripts.families build/families.json

docs: $(VENV)/.installed-dev ## the site, in build/site; the same strict build is a test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.installed-dev ## wheel and source archive, in dist/
	rm -rf dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## mypy, on a folder of links that shows it our folders under their one root
	rm -rf build/types && mkdir -p build/types/prunetune
	ln -s $(foreach part,$(wildcard prunetune/[a-z_]*.py prunetune/cli prunetune/outputs prunetune/testing) $(FOLDERS),$(CURDIR)/$(part)) build/types/prunetune/
	$(BIN)/mypy

check: lint types test

setup: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH_FROM) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

# lmms-eval without its pins: it asks for a wandb older than ours, and for dozens of packages of models we don't run.
# What it imports to run a task is in the dev extra.
LMMS_EVAL ?= lmms-eval==0.7.3

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# A tokenizer for tests, read from the wheel: installed, it would ask for an older NumPy. Without it they are skipped.
	-$(BIN)/python -m pip download --quiet --no-deps --dest build/wheels mistral-common==1.12.0
	$(BIN)/python -m pip install --quiet --no-deps "$(LMMS_EVAL)"
	touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache
