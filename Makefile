# `make quickstart` and `make test` work on a bare machine with Python 3.10 or newer: they set up .venv/ themselves.

PYTHON ?= python3
BIN := .venv/bin
# The oldest supported transformers, in a folder that comes first on the path, with older versions of two dependencies.
OVERLAY := $(CURDIR)/.venv/transformers-4.57
# Distribute by file, so that a server and a browser are started once.
PYTEST := -q -n auto --maxprocesses 4 --dist loadfile
# Tests that import datasets or Gradio are left out: these need a newer Hub client than transformers 4.57 has.
INFERENCE := tests/modeling_sslam/inference
NEEDS_NEW_HUB := $(INFERENCE)/embedding $(INFERENCE)/test_prefetch.py $(INFERENCE)/commands/test_app_page.py \
	$(INFERENCE)/commands/test_app_browser.py tests/modeling_sslam/published/test_hub_embeddings.py \
	tests/modeling_sslam/common/test_encoded_audio.py tests/modeling_sslam/common/test_recordings.py

.PHONY: help quickstart test test-transformers-5 test-transformers-4.57 test-fast coverage bench lint clean

help:
	@echo "make quickstart   pre-train, fine-tune, evaluate and use a tiny model, on the recordings of examples/sounds"
	@echo "make test         lint, then the tests on transformers 5 and on 4.57"
	@echo "make test-fast    the fast tests, on transformers 5: under a minute on two idle cores"
	@echo "make coverage     the tests on transformers 5, with the lines that they miss (htmlcov/index.html)"
	@echo "make bench        speed and memory against rivals in the same run: half an hour on two cores"
	@echo "make lint         ruff, import-linter and mypy"
	@echo "make clean        remove the environment and the files that the commands above wrote"

quickstart: .venv/ready
	$(BIN)/python -m examples.quickstart outputs/quickstart

test: lint test-transformers-5 test-transformers-4.57

test-transformers-5: .venv/ready
	$(BIN)/python -m pytest $(PYTEST)

test-transformers-4.57: $(OVERLAY)/ready
	PYTHONPATH=$(OVERLAY) $(BIN)/python -m pytest $(PYTEST) tests/modeling_sslam tests/conversion \
		$(NEEDS_NEW_HUB:%=--ignore=%)

test-fast: .venv/ready
	$(BIN)/python -m pytest $(PYTEST) -m "not slow and not browser"

coverage: .venv/ready
	$(BIN)/python -m pytest $(PYTEST) --cov --cov-report=term --cov-report=html

bench: .venv/ready
	$(BIN)/python -m benchmarks

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(OVERLAY)/ready: .venv/ready
	rm -rf $(OVERLAY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OVERLAY) \
		"transformers==4.57.6" "tokenizers==0.22.*" "huggingface_hub<1"
	touch $@

clean:
	rm -rf .venv outputs htmlcov .coverage*
