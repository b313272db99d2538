# Everything is made in .venv; nothing else of the machine is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUNS   ?= runs/demo
# Without a GPU its kernels are tested in Triton's interpreter. Tests start processes, which would
# compile every file again if nobody wrote what was compiled.
TESTS  := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(if $(wildcard /dev/nvidiactl /dev/kfd),,TRITON_INTERPRET=1) \
          $(BIN)/python -m pytest -n 2 --dist worksteal

# The core, for the inner loop: 36 seconds of one core, half of it imports.
QUICK  := tests/unit/test_pattern.py tests/unit/test_schedules.py tests/unit/test_targets.py \
          tests/unit/test_audit.py tests/flow/test_flow.py tests/flow/test_flow_errors.py \
          tests/native/test_native.py tests/packed/test_compress.py \
          tests/experiments/test_config.py tests/experiments/test_catalog.py

.PHONY: help demo docs test test-quick test-slow test-gpu test-kills test-versions lint format lock sanitize bench figures study wheel clean

help:  ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(READY)  ## Train five recipes on four seeds (minutes) and write the report
	$(BIN)/nmflow train demo --output $(RUNS)
	$(BIN)/nmflow report $(RUNS)

docs: $(READY)  ## The documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test: $(READY)  ## The fast tests, under 10 minutes on 2 cores
	$(TESTS)

test-quick: $(READY)  ## A choice of the fast tests, under a minute on 2 cores
	$(TESTS) $(QUICK)

test-kills: $(READY)  ## Kill train and sweep 25 times on each two-core config (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -s tests/experiments/test_kills.py

test-slow: $(READY)  ## The slow tests, too
	$(TESTS) -m slow

test-gpu: $(READY)  ## All that needs a GPU, in eight minutes; results in build/gpu
	$(BIN)/python scripts/test_gpu.py

test-versions: $(READY)  ## Oldest and newest Python, torch and transformers; writes docs/versions.md
	$(BIN)/python scripts/test_versions.py

wheel: $(READY)  ## An sdist, and a wheel for this platform and every Python, in dist/
	NMFLOW_BUILD=required $(BIN)/python -m build --no-isolation --outdir dist

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(READY)  ## Format and sort imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

sanitize: $(READY)  ## The kernels' tests under AddressSanitizer and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/sanitize.sh

bench: $(READY)  ## The benchmarks of docs/benchmarks; give them a quiet machine
	$(BIN)/python benchmarks/overhead.py --csv docs/benchmarks/data/overhead.csv
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/end_to_end.py

figures: $(READY)  ## Make docs/figures from the tables and the schedules
	$(BIN)/python scripts/site_figures.py

study: $(READY)  ## Make the pages of docs/study from the tables of its results
	$(BIN)/python study/pages.py
	$(BIN)/python scripts/site_figures.py

lock: $(READY)  ## Resolve requirements.lock anew
	$(BIN)/pip-compile --quiet --extra dev --strip-extras --allow-unsafe --upgrade \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header \
	  --constraint requirements.in --output-file requirements.lock pyproject.toml
	sed -i -E 's/\+cpu$$//; /^ *# /d; /^nmflow @/d' requirements.lock

clean:  ## Remove what was made
	rm -rf $(VENV) build dist runs

# The lock is installed first, so that the library is built without another download.
$(READY): requirements.lock pyproject.toml $(wildcard setup.py csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nmflow needs Python 3.10 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
