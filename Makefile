# Two commands matter: `make demo` and `make test`. Both set up all they need in .venv and can be repeated without harm.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKOV := infra/.checkov

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo test faults gpu-check lint format bench infra-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(INSTALLED)  ## a virtual environment with the pinned packages; rebuilt only when the lists change

# pip is run again only when one of the two lists is newer than the last complete installation.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedsam needs Python 3.11 or newer; name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (once; PyTorch makes it a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## a federation of three synthetic hospitals on a local Ray cluster
	@$(BIN)/fedsam demo work_dir="$(CURDIR)/.fedsam"

test: setup  ## every test (real scans too, where FEDSAM_REAL_DATA names their folder)
	$(BIN)/python -m pytest

faults: setup  ## the tests that break processes, nodes, links and stores, and a table of what each fault cost
	$(BIN)/python -m pytest -m faults

gpu-check: setup  ## the tests that want a GPU; all others hide it from torch
	FEDSAM_GPU_CHECK=1 $(BIN)/python -m pytest tests/core/test_gpu.py

lint: setup  ## style, types, floors, secrets in the sources, known weaknesses of packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/scan.py secrets
	$(BIN)/python tools/scan.py packages

format: setup  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## the measurements that need no argument, minutes each; the others say with --help what they want
	@for name in secagg sketch scheduling; do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

# Checkov pins packages that are not ours, so it has an environment of its own.
$(CHECKOV)/.installed: infra/checkov.txt
	@test -x $(CHECKOV)/bin/python || $(PYTHON) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install --quiet --disable-pip-version-check -r infra/checkov.txt
	@touch $@

infra-check: setup $(CHECKOV)/.installed  ## Terraform, images and manifests: linted, planned, applied against a mock of AWS, booted (minutes)
	$(CHECKOV)/bin/checkov --directory infra/terraform --framework terraform --compact --quiet --skip-download
	@if unshare --map-root-user --net ip link set lo up 2>/dev/null; then \
		FEDSAM_INFRA_CHECK=1 FEDSAM_OWN_NETWORK=1 unshare --map-root-user --net sh -c 'ip link set lo up && exec $(BIN)/python -m pytest tests/infra'; \
	else \
		echo "NOT CHECKED: machines' first boot, because unshare(1) may not make a network here"; \
		FEDSAM_INFRA_CHECK=1 $(BIN)/python -m pytest tests/infra; \
	fi

clean:  ## remove what the commands above made
	rm -rf $(VENV) $(CHECKOV) .fedsam .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
