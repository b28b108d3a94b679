# Each target sets up .venv by itself, from a bare Python >= 3.11; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Versions of transformers that the models are tested with, each in a virtual environment of its own.
MATRIX := 5.16.1 5.19.0 newest

.PHONY: demo test test-matrix test-transformers lint format clean

demo: $(READY)
	$(BIN)/fmem demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

test-matrix: $(MATRIX:%=.venv-matrix/%/tested)

.venv-matrix/%/tested: FORCE
	$(PYTHON) -m venv .venv-matrix/$*
	grep -v ^transformers constraints.txt > .venv-matrix/$*/constraints.txt
	[ $* = newest ] || echo transformers==$* >> .venv-matrix/$*/constraints.txt
	.venv-matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-matrix/$*/constraints.txt torch
	.venv-matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-matrix/$*/constraints.txt --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-matrix/$*/bin/python -m pytest --numprocesses 2 tests/models/test_huggingface.py tests/models/test_huggingface_training.py tests/models/test_calling.py tests/models/test_transformer.py tests/layers/test_mamba2.py tests/layers/test_gated_delta_net.py tests/training/test_pretrained.py $(ARGS)
	@touch $@

FORCE:

# The common tests that the source distribution of transformers carries, run on our models. The markers that its tests name are not
# ours, and its warnings are about itself.
OF_TRANSFORMERS := .venv-transformers

test-transformers:
	$(PYTHON) -m venv $(OF_TRANSFORMERS)
	$(OF_TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(OF_TRANSFORMERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' parameterized
	rm -rf $(OF_TRANSFORMERS)/source
	$(OF_TRANSFORMERS)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers --dest $(OF_TRANSFORMERS)/source \
		transformers==$$($(OF_TRANSFORMERS)/bin/python -c 'import transformers; print(transformers.__version__)')
	tar -xzf $(OF_TRANSFORMERS)/source/transformers-*.tar.gz -C $(OF_TRANSFORMERS)/source --strip-components 1
	touch $(OF_TRANSFORMERS)/source/tests/__init__.py
	TRANSFORMERS_TESTS=$(OF_TRANSFORMERS)/source/tests $(OF_TRANSFORMERS)/bin/python -m pytest --numprocesses 2 tests/common_of_transformers.py \
		--override-ini addopts="--import-mode=importlib -q -p no:benchmark" --override-ini filterwarnings=ignore $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .venv-matrix $(OF_TRANSFORMERS)

# torch comes first: where a CPU build of the pinned version lies at hand it is taken, before anything could ask for another.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: $(PYTHON) is Python %d.%d; set PYTHON=... to Python >= 3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
