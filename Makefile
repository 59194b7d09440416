# make venv | test | bench | publish | lint | format | csrc | gate | hardware | test-gpu | sanitizer |
# test-newest-triton | test-oldest-peft: each works on a fresh clone.
# PY=python3 uses an interpreter that has the requirements already, and makes no .venv.

PYTHON ?= python3
VENV := .venv
NEWEST_TRITON := 3.9.0
OLDEST_PEFT := 0.18.0
TRITON_TESTS := $(addprefix tests/kernels/test_,kernels.py skinny.py skinny_group.py swiglu.py)
PEFT_TESTS := $(addprefix tests/peft/test_,layer.py patch.py lora_bias.py dora.py groups.py gated.py merging.py quantised.py)
# Where what a GPU said goes, and the kernels that are meant, such as KERNELS="triton-skinny cuda-z_jobs".
OUT ?= build/hardware
HARDWARE = $(PY) -m benchmarks.hardware --out $(OUT) --seconds 570 $(if $(KERNELS),--kernels $(KERNELS))
CPP := $(wildcard $(foreach folder,csrc tests/csrc tests/csrc/host_model tests/stub_gpu,$(addprefix $(folder)/*.,cu cuh h hpp cpp)))
CLANG_FORMAT = $(PY) -c "from clang_format import clang_format; clang_format()"

ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: help venv test bench publish lint format csrc gate hardware test-gpu sanitizer test-newest-triton test-oldest-peft clean

help:
	@echo "Times are those of two cores, without what the first of them takes to fill .venv."
	@echo "make venv                makes .venv, with the pinned requirements and this tree; the others do it themselves"
	@echo "make test                8 min   the tests: oracle, autograd, interpreter, host model, launches without a GPU"
	@echo "make bench               4 min   what a LoRA layer and a LoRA model cost here, then a real fine-tune"
	@echo "make publish             measures this machine for benchmarks/results/ and renders README.md from it"
	@echo "make lint                10 s    ruff, clang-format and mypy"
	@echo "make format              writes what make lint wants of the layout"
	@echo "make csrc                the CUDA kernels, compiled where nvcc is: what changed"
	@echo "make gate                4 min   every kernel compiled: registers, spills, shared memory, fences, instructions"
	@echo "make hardware            proves and times every kernel on this machine's GPU, in at most ten minutes; OUT=DIR"
	@echo "make test-gpu            the tests alone; KERNELS=\"triton-skinny cuda-z_jobs\" picks kernels"
	@echo "make sanitizer           the kernels' tests under compute-sanitizer"
	@echo "make test-newest-triton  3 min   the kernel tests on Triton $(NEWEST_TRITON)"
	@echo "make test-oldest-peft    the tests of PEFT's layers on PEFT $(OLDEST_PEFT)"
	@echo "One file: $(PY) -m pytest tests/backends/test_dispatch.py"

venv: $(READY)
	@echo "$(PY) is ready"

$(VENV)/.ready: requirements.txt pyproject.toml setup.py csrc/build.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	$(PY) -m pip install --quiet --no-deps --editable .
	touch $@

test: $(READY)
	$(PY) -m pytest -n auto --dist worksteal
	$(PY) -m pytest benchmarks

bench: $(READY)
	$(PY) -m benchmarks layers
	$(PY) -m benchmarks model
	$(PY) examples/finetune.py

publish: $(READY)
	status=0; for command in layers "layers --profile small" "layers --profile variants" model paper; do \
	  $(PY) -m benchmarks $$command --publish || status=$$?; [ $$status -lt 2 ] || exit $$status; \
	done; $(PY) -m benchmarks report && exit $$status

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i $(CPP)

csrc: $(READY)
	$(PY) csrc/build.py

gate: $(READY)
	$(PY) tests/kernels/compile_gate.py
	$(PY) tests/csrc/cuda_gate.py

hardware: $(READY)
	$(HARDWARE)

test-gpu: $(READY)
	$(HARDWARE) --only tests

sanitizer: $(READY)
	$(HARDWARE) --only build memcheck

test-newest-triton: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target .cache/triton-$(NEWEST_TRITON) triton==$(NEWEST_TRITON)
	PYTHONPATH=.cache/triton-$(NEWEST_TRITON) $(PY) -m pytest $(TRITON_TESTS)

test-oldest-peft: $(READY)
	$(PY) -m pip install --quiet --no-deps --upgrade --target .cache/peft-$(OLDEST_PEFT) peft==$(OLDEST_PEFT)
	PYTHONPATH=.cache/peft-$(OLDEST_PEFT) $(PY) -m pytest $(PEFT_TESTS)

clean:
	rm -rf fastlora/*.so $(VENV) .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
