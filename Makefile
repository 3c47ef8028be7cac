# Everything a newcomer needs is `make quickstart` and `make test`; both install what they need on first use.
.DEFAULT_GOAL := help
.PHONY: help quickstart zoom zoom-without test lint clean

PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
TE := transformer_engine==2.20.2 nvdlfw-inspect==0.2.2 onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# One environment each; whoever has the larger one has the smaller.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo "gspo_mm needs Python 3.12 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/quickstart: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[quickstart]'
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet -e '.[quickstart,sglang,dev]'
# apart: its library needs a GPU, and where Python finds it megatron-core imports it (tests/te runs it without)
	$(BIN)/pip install --quiet --upgrade --no-deps --target .venv/te $(TE)
	@touch .venv/quickstart $@

quickstart: .venv/quickstart  ## teach a small model to read handwritten digits (about 5 minutes on 2 CPU cores)
	test -f data/digits/train-000000.tar || $(BIN)/python tools/make_shards.py digits data/digits
	test -f data/tiny-model/config.json || $(BIN)/python tools/make_tiny_model.py data/tiny-model
	$(BIN)/gspo-mm sft configs/quickstart_sft.yaml run.seed=$(SEED)
	$(BIN)/gspo-mm train configs/quickstart.yaml run.seed=$(SEED)

zoom: data/tiny-zoom  ## digits too small to read: GSPO with a tool that enlarges (about 7 minutes on 2 CPU cores)
	test -f data/zoom/train-000000.tar || $(BIN)/python tools/make_shards.py zoom data/zoom
	$(BIN)/gspo-mm sft configs/zoom_sft.yaml run.seed=$(SEED)
	$(BIN)/gspo-mm train configs/zoom.yaml run.seed=$(SEED)

# what the run without the tool does otherwise: it answers at once
WITHOUT := rollout.environment=null rollout.sampling.max_new_tokens=16 'data.train=["data/zoom-direct/train-*.tar"]'

zoom-without: data/tiny-zoom  ## the same without the tool (about 4 minutes)
	test -f data/zoom-direct/train-000000.tar || $(BIN)/python tools/make_shards.py zoom data/zoom-direct --calls 0
	$(BIN)/gspo-mm sft configs/zoom_sft.yaml run.seed=$(SEED) run.name=zoom-without-sft-$(SEED) $(WITHOUT) \
		'data.validation=["data/zoom-direct/validation-*.tar"]'
	$(BIN)/gspo-mm train configs/zoom.yaml run.seed=$(SEED) run.name=zoom-without-$(SEED) $(WITHOUT) \
		'data.validation=["data/zoom-direct/validation-*.tar"]' model.path=runs/zoom-without-sft-$(SEED)/hf

data/tiny-zoom: | .venv/quickstart
	$(BIN)/python tools/make_tiny_model.py $@ --tools

test: .venv/dev  ## lint, type check and run all tests that need no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	tests/slurm/install.sh
	$(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=25

lint: .venv/dev  ## fix what ruff can fix, then type check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

clean:  ## remove the environment, data and runs
	rm -rf .venv data runs
