# The targets that people type. Each first makes .venv, once, with the Python that PYTHON names.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/jaxllm-installed
NANO := configs/mimo-nano
LIBTPU := .venv/libtpu

.PHONY: demo test bench aot

demo: build/mimo-nano/config.json       # text in seven languages on 8 emulated devices
	$(BIN)/python tools/demo.py build/mimo-nano

test: $(INSTALLED) $(LIBTPU)            # style, types, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist worksteal

bench: $(INSTALLED)                     # speed on this machine, the peers that are installed beside it
	$(BIN)/python tools/bench.py

aot: $(INSTALLED) $(LIBTPU)             # the released models compiled for TPU slices, hours
	$(BIN)/python tools/compile_all.py

build/mimo-nano/config.json: $(NANO)/config.json $(NANO)/model.safetensors $(NANO)/tokenizer.model | $(INSTALLED)
	rm -rf build/mimo-nano
	$(BIN)/jaxllm convert $(NANO) build/mimo-nano

$(LIBTPU): | $(INSTALLED)
	@echo "installing libtpu, 680 MB, to compile for TPUs that are not here"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LIBTPU).part \
	    "$$($(BIN)/python -c "from importlib.metadata import requires; print(*(r.split(';')[0] for r in requires('jax') if 'libtpu' in r))")"
	mv $(LIBTPU).part $(LIBTPU)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, a minute or two"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
