# The targets that people type. Each first makes .venv, once, with the Python that PYTHON names.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/jaxllm-installed
NANO := configs/mimo-nano

.PHONY: demo test bench

demo: build/mimo-nano/config.json       # text in seven languages on 8 emulated devices
	$(BIN)/python tools/demo.py build/mimo-nano

test: $(INSTALLED)                      # style, types, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist worksteal

bench: $(INSTALLED)                     # speed on this machine, the peers that are installed beside it
	$(BIN)/python tools/bench.py

build/mimo-nano/config.json: $(NANO)/config.json $(NANO)/model.safetensors $(NANO)/tokenizer.model | $(INSTALLED)
	rm -rf build/mimo-nano
	$(BIN)/jaxllm convert $(NANO) build/mimo-nano

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, a minute or two"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
