# make demo   sets everything up, runs the quickstart, ends with its table
# make test   the tests (under 20 minutes on two cores)
# make check  lint and types
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow test-cluster test-chaos check lock clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/python examples/quickstart_data.py examples/data/quickstart
	$(BIN)/raylign run examples/quickstart.yaml

# Those without trainers need one core each.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not cluster" --ignore tests/integration
	$(BIN)/python -m pytest -m "not slow and not cluster" --durations=15 tests/integration

# Of the longer ones none is begun after BUDGET minutes, where that is given.
LIMIT = $(if $(BUDGET),--budget $(BUDGET))
FAULTS ?= worker or node or driver or disk

# Several nodes, an autoscaler, an object store, jobs.
test-cluster: install
	$(BIN)/python -m pytest -m cluster --ignore tests/chaos $(LIMIT)

# Faults at random moments of a chain: a worker, a node and the driver killed, a full disk (`python -m tests.chaos.chaos` has more).
test-chaos: install
	$(BIN)/python -m pytest tests/chaos -k "$(FAULTS)" $(LIMIT)

test-slow: install
	$(BIN)/python -m pytest -m "slow and not cluster" $(LIMIT)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pin what is installed now; torch stays the plain version, so that the index decides between a CPU and a CUDA build.
lock:
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel | sed 's/^\(torch==[0-9.]*\)+cpu/\1/' > requirements.lock

clean:
	rm -rf $(VENV) runs examples/data build *.egg-info
