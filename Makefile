# make train | test | test-slow | test-long | test-slurm | sanitize | check | bench | build | cuda-check | gpu-check | wheel
#
# Without PYTHON these work in .venv, which is made when there is none and brought up to date when
# pyproject.toml, setup.py, constraints.txt or csrc/ change. With PYTHON=python3 (or any other interpreter)
# that one is used as it is and nothing is installed: for machines with their own torch, or no network.

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
READY := .venv/.installed
READY_SLOW := .venv/.installed-slow
endif

RANKS ?= 2
ARGS ?=
PYTEST_ARGS ?=
PART ?=

# Two files of tests at a time. Whoever brings a PYTHON of their own may not have pytest-xdist.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses=2 --dist=loadfile)

PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: help clean train test test-slow test-long test-slurm test-docker sanitize check bench build cuda-check gpu-check wheel

help:
	@echo "make train   train configs/quickstart.yaml on $(RANKS) processes; ARGS='train.steps=50' overrides, RANKS=1"
	@echo "make test    all tests but the slow ones; PYTEST_ARGS='-k router' selects"
	@echo "make test-slow   the slow ones, those of the DeepSpeed engine among them"
	@echo "make test-long   two hundred steps of the quickstart's model in every layout: a quarter of an hour, not in CI"
	@echo "make test-slurm  the launch file for Slurm on a cluster of two nodes on this host; ARGS=--stops=20 stops a job often"
	@echo "make sanitize the operator tests on kernels compiled with address, undefined-behaviour and thread sanitizers"
	@echo "make check   ruff, mypy, import contracts, the schema of the CI workflow"
	@echo "make bench   every benchmark; ARGS=--quick shows in seconds that they run"
	@echo "make build   compile the native kernels in place, with the torch of PYTHON and no network"
	@echo "make cuda-check   only compile the CUDA kernels: needs nvcc, neither a GPU nor a torch with CUDA"
	@echo "make gpu-check    build, tests, benchmarks and a training run on one GPU; PART=build|test|bench|train: one of them"
	@echo "make clean   remove what was built and cached; .venv, runs and data stay"
	@echo "make wheel   a wheel with the native kernels in dist/"
	@echo "make test-docker  build the CPU image and run it: as root, with mmdebstrap, buildah and bubblewrap; not in CI"
	@echo "PYTHON=...   use this interpreter as it is and install nothing"

train: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(PYTHON) -c 'import os; print(max(1, os.cpu_count() // $(RANKS)))')} \
	$(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) -m epmoe train configs/quickstart.yaml $(ARGS)

test: $(READY)
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(READY) $(READY_SLOW)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-long: $(READY)
	$(PYTEST) -m long $(PYTEST_ARGS)

test-slurm: $(READY)
	PYTHONPATH=. $(PYTHON) tests/slurm/run.py $(ARGS)

sanitize: $(READY)
	$(PYTHON) tests/sanitize/run.py

check: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PYTHON) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yaml

bench: $(READY)
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; THP_MEM_ALLOC_ENABLE=$${THP_MEM_ALLOC_ENABLE:-1} PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) "$$script" $(ARGS); done

# What git does not track and these targets make; .venv, runs and prepared data stay.
clean:
	rm -rf build dist epmoe.egg-info epmoe/_C.abi3.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find benchmarks epmoe examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

build: $(READY)
	EPMOE_NATIVE=1 $(PYTHON) setup.py --quiet build_ext --inplace --force
	@$(PYTHON) -c 'from epmoe.ops import kernel_status; print("kernels:", *kernel_status())'

cuda-check: $(READY)
	$(PYTHON) setup.py --quiet cuda_check

gpu-check: $(READY)
	$(PYTHON) benchmarks/gpu_check.py $(PART)

wheel: $(READY)
	$(PYTHON) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

test-docker:
	docker/test.sh

# torch comes first: the native kernels are compiled against it, which an isolated build could not see.
.venv/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x .venv/bin/python || python3 -m venv .venv
	$(PIP) install -c constraints.txt torch 'setuptools>=77'
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,examples]'
	@.venv/bin/python -c 'from epmoe.ops import kernel_status; print("kernels:", *kernel_status())'
	touch $@

# Not with the editable package, whose kernels would be compiled again.
.venv/.installed-slow: .venv/.installed
	$(PIP) install -c constraints.txt --no-build-isolation deepspeed
	touch $@
