# Every target does its own set-up: a virtual environment in .venv, then what it needs.
VENV := .venv
PYTHON := python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPES := .types/biroute

.PHONY: help install constraints versions train test chaos browser check gpu-check mutate bench ui docs docs-check pages types clean

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
	    printf '%-14s %s\n' "$$name" "$$what"; done

install: $(INSTALLED) ## the virtual environment .venv, with what configs/constraints.txt says (1.5 GB; minutes)

$(INSTALLED): pyproject.toml configs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint configs/constraints.txt --editable '.[dev]'
	touch $@

data/demo/text/.complete: | $(INSTALLED)
	$(BIN)/biroute data demo data/demo/text
	touch $@

# Write down the versions that are installed now, for every later `make install`.
constraints: $(INSTALLED) ## write down the versions that are installed now, for every later install
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//; /@/d' > configs/constraints.txt

# `make check` and the layout tests with the oldest and the newest versions that pyproject.toml allows. The interpreter
# of Triton 3.6, which belongs to torch 2.11, does not work with NumPy 2.4.
versions: types ## lint, types and parity tests with the oldest and the newest allowed packages
	for kind in oldest newest; do \
	    $(PYTHON) -m venv .venv-$$kind && \
	    if [ $$kind = oldest ]; then pins='torch==2.11.* megatron-core==0.16.* deepspeed==0.19.4 numpy<2.4'; else pins=; fi && \
	    .venv-$$kind/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $$pins --editable '.[dev]' && \
	    .venv-$$kind/bin/python -m pip list | grep -E '^(torch|megatron-core|deepspeed|transformers|triton) ' && \
	    .venv-$$kind/bin/ruff check . && .venv-$$kind/bin/mypy && \
	    OMP_NUM_THREADS=1 .venv-$$kind/bin/python -m pytest tests/unit -m 'not slow' tests/distributed/parallel/test_layouts.py \
	        tests/distributed/model || exit 1; \
	done

# The main job: real text -> shards -> a trained model that MLflow shows. Each part skips what is done.
train: $(INSTALLED) data/demo/text/.complete ## the main job: real text, shards, a trained model that MLflow shows (seven to fifteen minutes)
	$(BIN)/biroute data build configs/demo.yaml
	$(BIN)/biroute train configs/demo.yaml
	@echo "to compare with:"
	@$(BIN)/biroute data bigram configs/demo.yaml

test: $(INSTALLED) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python tests/run.py

# Faults of every kind on a real throw-away Slurm cluster, about half an hour; needs root.
chaos: $(INSTALLED) ## faults on a throw-away Slurm cluster (half an hour, needs root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/system/slurm -m chaos -s

# What a person sees in MLflow, in headless Chromium (apt-get install chromium), about four minutes.
browser: $(INSTALLED) ## pages of MLflow in headless Chromium (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/system/test_browser.py -m browser

# The installed package is called biroute; mypy and import-linter want to see it under that name.
types: ## links that show the packages to mypy under their installed name
	mkdir -p $(TYPES)
	for part in configs model parallel data_pipeline launcher slurm; do ln -sfn ../../$$part $(TYPES)/$$part; done

check: $(INSTALLED) types ## lint, types, import contract, fast tests: before each commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m 'not slow'

# On a machine with a GPU: the tests of the kernels, compiled for it, what the machine can do, and how fast a layer is.
gpu-check: $(INSTALLED) ## on a machine with a GPU: the tests of its kernels, whole runs, what it can do, and the benchmark
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    BIROUTE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/unit/model/attention/block_sparse tests/unit/model/test_swiglu.py \
	        tests/system/test_gpu.py && \
	    $(BIN)/biroute doctor --gpu && $(BIN)/biroute bench gpu; \
	else echo "make gpu-check: torch sees no GPU here, so nothing was checked"; fi

# Small mistakes in the core, and settings that are forgotten, one at a time: do the tests notice? About an hour.
mutate: $(INSTALLED) ## small mistakes and forgotten settings, one at a time: do the tests notice?
	$(BIN)/python tests/mutation/mutate.py
	$(BIN)/python tests/mutation/forget.py

bench: $(INSTALLED) ## speed and memory of routed attention beside dense
	OMP_NUM_THREADS=1 $(BIN)/biroute bench attention

ui: $(INSTALLED) ## MLflow on the runs of the demo
	$(BIN)/biroute ui configs/demo.yaml

docs: $(INSTALLED) ## make generated pages and pictures anew: configuration, packages, a run, predictions
	$(BIN)/python -m biroute.configs.reference > docs/configuration.md
	$(BIN)/python docs/draw_packages.py
	$(BIN)/python docs/draw_run.py
	$(BIN)/python docs/write_plan_page.py
	$(BIN)/python docs/write_gpu_page.py
	$(BIN)/python docs/write_scaling_page.py

docs-check: $(INSTALLED) ## run the commands of the documentation, and check its links and YAML
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/test_docs.py tests/unit/test_packages.py \
	    tests/system/test_docs.py tests/system/test_help_examples.py

EXCHANGE := configs/demo.yaml parallel.data=1 model.sequence_length=4096 train.global_batch_size=1 \
    model.attention.descriptors_per_region=1 train.microbatch_size=1 train.steps=400 train.evaluate_sequences=16

# Some hours. The page on exchanges shows the routes of two runs, which are trained first.
pages: $(INSTALLED) ## measure all benchmark pages anew, from one commit
	test -z "$$(git status --porcelain)" || { echo "make pages: commit first, so that the pages name one commit"; exit 2; }
	$(BIN)/biroute bench attention --out docs/benchmarks
	$(BIN)/biroute bench decode --out docs/benchmarks
	$(BIN)/biroute bench recall --seeds 3 --out docs/benchmarks
	$(BIN)/biroute bench quality configs/demo.yaml --out docs/benchmarks
	$(BIN)/biroute bench memory configs/long.yaml train.evaluate_sequences=1 --out docs/benchmarks
	$(BIN)/biroute train $(EXCHANGE) train.run_dir=runs/exchange-token
	$(BIN)/biroute train $(EXCHANGE) train.run_dir=runs/exchange-region model.attention.query_block_size=16
	$(BIN)/biroute bench exchange runs/exchange-token/config.yaml --compare runs/exchange-region/config.yaml \
	    --out docs/benchmarks
	$(BIN)/biroute bench pictures --out docs/images

# Keeps data and runs: a trained model is nothing to clean away.
clean: ## remove the environment and build leftovers; data and runs stay
	rm -rf $(VENV) .venv-oldest .venv-newest .types build *.egg-info
	@echo "kept: data and runs; remove those yourself"
