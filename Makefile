# `make demo` draws pictures, `make test` checks everything; both make .venv first, in a second where it is there.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
# One process per core, eight at most (each imports torch); a file stays in one process, so its fixtures are made once.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-browser lint format

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

setup: ## make .venv and install the package with everything pinned
	@$(PYTHON) scripts/setup.py

demo: setup ## from nothing to pictures: data, CLIP, autoencoder, denoiser, report (20 minutes on 2 cores)
	$(BIN)/ldm data openmoji --out $(DEMO)/data/all --size 64
	$(BIN)/ldm data openmoji --out $(DEMO)/data/concepts --size 64 --concepts configs/openmoji/concepts.txt
	$(BIN)/ldm train configs/openmoji/clip.yaml configs/openmoji/vae.yaml configs/openmoji/unet.yaml
	@ln -sfn unet/pipeline $(DEMO)/pipeline
	$(BIN)/ldm evaluate $(DEMO)/pipeline --data $(DEMO)/data/concepts --retrieval --out $(DEMO) \
		--run $(DEMO)/clip --run $(DEMO)/vae --run $(DEMO)/unet

test: lint ## lint, types and the tests
	$(PYTEST)

test-slow: setup ## the tests that take minutes, the demo among them
	$(BIN)/python -m pytest -m slow

test-browser: setup ## the pages, in a headless Chromium; installs it with apt where there is none
	@$(BIN)/python scripts/browser.py
	$(BIN)/python -m pytest -m browser

lint: setup ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup ## put imports and layout in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
