# Every target does its own set-up: a virtual environment in .venv, then what it needs.
VENV := .venv
PYTHON := python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPES := .types/biroute

.PHONY: install constraints versions train test chaos check gpu-check mutate bench ui docs types clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml configs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint configs/constraints.txt --editable '.[dev]'
	touch $@

data/demo/text/.complete: | $(INSTALLED)
	$(BIN)/biroute data demo data/demo/text
	touch $@

# Write down the versions that are installed now, for every later `make install`.
constraints: $(INSTALLED)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//; /@/d' > configs/constraints.txt

# `make check` and the layout tests with the oldest and the newest versions that pyproject.toml allows. The interpreter
# of Triton 3.6, which belongs to torch 2.11, does not work with NumPy 2.4.
versions: types
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
train: $(INSTALLED) data/demo/text/.complete
	$(BIN)/biroute data build configs/demo.yaml
	$(BIN)/biroute train configs/demo.yaml
	@echo "to compare with:"
	@$(BIN)/biroute data bigram configs/demo.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/run.py

# Faults of every kind on a real throw-away Slurm cluster, about half an hour; needs root.
chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/system/slurm -m chaos -s

# The installed package is called biroute; mypy and import-linter want to see it under that name.
types:
	mkdir -p $(TYPES)
	for part in configs model parallel data_pipeline launcher slurm; do ln -sfn ../../$$part $(TYPES)/$$part; done

check: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m 'not slow'

# On a machine with a GPU: the tests of the kernels, compiled for it, and what the machine can do.
gpu-check: $(INSTALLED)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    BIROUTE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/unit/model/attention/block_sparse && \
	    $(BIN)/biroute doctor --gpu; \
	else echo "make gpu-check: torch sees no GPU here, so nothing was checked"; fi

# Small mistakes in the core, and settings that are forgotten, one at a time: do the tests notice? About an hour.
mutate: $(INSTALLED)
	$(BIN)/python tests/mutation/mutate.py
	$(BIN)/python tests/mutation/forget.py

bench: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/biroute bench attention

ui: $(INSTALLED)
	$(BIN)/biroute ui configs/demo.yaml

docs: $(INSTALLED)
	$(BIN)/python -m biroute.configs.reference > docs/configuration.md
	$(BIN)/python docs/draw_packages.py
	$(BIN)/python docs/draw_run.py

# Keeps data and runs: a trained model is nothing to clean away.
clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .types build *.egg-info
	@echo "kept: data and runs; remove those yourself"
