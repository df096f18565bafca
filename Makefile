# CI and people call these targets and nothing else. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements.lock)
TORCH_INDEX ?= # an index of torch's builds, such as the one of its CPU builds; empty: pip's own
STAMP := $(VENV)/.lcbench-installed

.PHONY: help setup demo test test-fast coverage lint wheel bench soak docs site pictures mlflow browser cluster-up cluster-down cluster-status gpu-check gpu-cells

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## create .venv with exact pins (python3 must be 3.11 or later)

# torch first, from an index of its own where one is named. It is in the lock, with the triton that its CUDA builds want, so that
# nothing that comes after moves it; what does not fit together in the end stops here.
$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lcbench needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(strip $(TORCH_INDEX)),--index-url $(strip $(TORCH_INDEX))) $(TORCH)
	$(BIN)/pip install -q -c requirements.lock -e '.[dev]'
	$(BIN)/python -c 'import sys; from importlib.metadata import version as v; n = v("torch").split("+")[0]; sys.exit(n != "$(TORCH)"[7:] and f"torch {n} was installed instead of $(TORCH)")'
	$(BIN)/pip check
	@touch $@

demo: setup ## a small checked sweep on this machine and its report, in a few minutes
	$(BIN)/python -m lcbench.sweep +experiment=smoke
	$(BIN)/python -m lcbench.report last
	@echo
	@echo 'Your own grid:  . .venv/bin/activate; python -m lcbench.sweep -m cp=ring,ulysses seqlen=2k,4k scale=1x2 heads=8x4x64 dtype=float32'
	@echo 'Only the plan:  python -m lcbench.sweep -m cp=ring,ulysses,usp seqlen=64k,256k,1m site=plain hydra/launcher=dry'

# K chooses tests by name (pytest's -k); then a part that has none of them is no failure.
PYTEST = $(BIN)/python -m pytest -q $(if $(K),-k '$(K)')
BESIDE := -p no:cacheprovider -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
ON_CLUSTER := tests/slurm
ONE_IN ?= 8
TURN ?= $(shell git rev-list --count HEAD 2>/dev/null || echo 0)
BY_TURNS = $(if $(K),,--one-in $(ONE_IN) --turn $(TURN))
NONE_IS_FINE = $(if $(K),|| [ $$? -eq 5 ])

# The tests on the cluster wait for most of their time; the others compute meanwhile, as long as nobody on the cluster wants to.
# Those with a rank for most GPUs of the cluster fill the machine's memory and cores, so they come last and alone.
# Of a test with many cases it takes one case in ONE_IN, of slow tests that need no cluster one test in ONE_IN, and TURN says which: with
# each commit other ones, so that ONE_IN commits in a row take all.
test: setup cluster-up browser ## all tests, of cases and of slow tests an eighth by turns (ONE_IN=1: all), on the development cluster too (needs root and Debian for that); K=... chooses by name
	@{ $(PYTEST) -m 'slurm and not wide' $(ON_CLUSTER) $(BY_TURNS) $(NONE_IS_FINE); } >$(VENV)/slurm-tests.log 2>&1 & cluster=$$!; \
	{ nice -n 15 $(PYTEST) -m 'not slurm' $(BY_TURNS) $(BESIDE) $(NONE_IS_FINE); }; others=$$?; \
	wait $$cluster; code=$$?; cat $(VENV)/slurm-tests.log; \
	{ $(PYTEST) -m wide $(ON_CLUSTER) $(BY_TURNS) $(NONE_IS_FINE); }; exit $$((code | others | $$?))

# Of a test that goes through all kernels or masks one case in 32; all of those that K chooses.
test-fast: setup ## a share of the tests that need no cluster, no root and little time each; K=... chooses by name
	$(PYTEST) -m 'not slow and not slurm' $(if $(K),,--one-in 32) $(BESIDE) $(NONE_IS_FINE)

coverage: setup ## which lines the fast tests reach in their own process (ranks and commands in processes of their own count not)
	$(PYTEST) -m 'not slow and not slurm' $(BESIDE) --cov --cov-report=term:skip-covered $(NONE_IS_FINE)

lint: setup ## ruff, and mypy of code and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: setup ## dist/lcbench-<version>-py3-none-any.whl, with conf/ inside
	$(BIN)/python -m hatchling build -t wheel

bench: setup cluster-up ## how long planning, masks, strategies and large sweeps take; how well 60 cells are predicted from 12; what planners gain; which faults the check finds; 2,000 sound cells
	$(BIN)/python -m tests.bench_sweeps
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench_predict
	$(BIN)/python -m tests.advice.recorded
	$(BIN)/python -m tests.planners.study --batches 20
	$(BIN)/python -m tests.measure.faults --processes $$(nproc)
	$(BIN)/python -m tests.measure.sound --processes $$(nproc)

soak: setup cluster-up ## MINUTES (30) of sweeps with random faults, from SEED (0); prints the counts
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),0)

docs: setup ## draw the docs' pictures, write their tables again, and build dist/site from them: open dist/site/index.html
	$(BIN)/python -m lcbench.masks --gallery docs/masks.png lengths=uniform lengths.high=4k
	$(BIN)/python -m tests.docs.drawings
	$(BIN)/python -m lcbench.kernels --platform cpu --markdown > docs/support-cpu.md
	$(BIN)/python -m lcbench.kernels --platform h200 --markdown > docs/support-h200.md
	$(BIN)/python -m lcbench.results --schema > docs/attempt.schema.json
	$(BIN)/python -m tests.docs.shown
	$(MAKE) site

site: setup ## build dist/site from docs/, which fails on a link or an anchor that leads nowhere
	$(BIN)/python -m mkdocs build --strict --quiet

pictures: setup browser ## of the newest sweep's report and of its dashboard, for the docs
	$(BIN)/python -m tests.pictures

mlflow: setup ## MLflow server with the results of this checkout; prints its address
	@slurm/mlflow.sh

browser: ## Chromium, for tests that look at pages (installs Debian's, as root)
	@tests/browser.sh

cluster-up: ## start the development Slurm cluster (12 nodes x 8 GPU slots on this machine)
	@slurm/devcluster/devcluster up

cluster-down: ## stop it and remove its folder
	@slurm/devcluster/devcluster down

cluster-status: ## its nodes and daemons
	@slurm/devcluster/devcluster status

gpu-check: ## on a machine with a GPU: kernels against the reference, then timed; writes results/<gpu>/
	$(PYTHON) -m lcbench.testing.gpu_check

# Needs what planning needs (hydra-core, submitit, pydantic, pandas, scipy, rich, jinja2, filelock), not MLflow; lcbench need not be installed.
gpu-cells: export PYTHONPATH := $(CURDIR):$(CURDIR)/launchers$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-cells: ## on a machine with a GPU: whole cells through the worker, on one rank and on two that share it; writes results/<gpu>/cells/
	out=$$($(PYTHON) -m lcbench.testing.gpu_check --folder) && \
	$(PYTHON) -m lcbench.sweep +experiment=gpu_cells,gpu_cells_sparse,gpu_cells_ranks results="$$out" sweep=cells force=true
