# One folder, .venv, holds everything that these targets install; `make clean` removes it.

RECIPE ?= quickstart
ARGS ?=
PYTHON ?=
DATA_DIR ?=
STUDY ?= full
DEVICE ?= gpu

# Neighbouring tests, which share models, stay in one process until another has nothing to do.
IN_PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=worksteal
BENCHMARKS := op layer train decode memory
LONG_TESTS := tests/ops/test_properties.py tests/layers/test_properties.py tests/data tests/models/test_tokenizer.py \
	tests/runs/test_recipe_fuzz.py tests/runs/test_resume.py
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_JAX := $(VENV)/.installed-jax
INSTALLED_DOCS := $(VENV)/.installed-docs
# The rest does not depend on the Keras backend, or is TensorFlow's: data, exports, benchmarks.
TESTS_OF_BACKENDS := tests/ops tests/experimental tests/layers tests/conformance tests/models tests/test_second_derivatives.py \
	tests/runs/test_backends.py tests/runs/test_devices.py
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
# ensurepip is what `python -m venv` needs, and what Debian and Ubuntu ship apart (python3-venv).
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

.PHONY: help train study test test-all test-jax soak bench check-gpu docs notebooks lint clean

help:
	@echo "make train [RECIPE=quickstart] [ARGS=...]  train a model; RECIPE is a name (elita recipes) or a file"
	@echo "make study DATA_DIR=... [STUDY=short]      train what docs/results.md compares: hours, or one with short"
	@echo "make test  [ARGS=...]                      run the quick tests with pytest: minutes"
	@echo "make test-all [ARGS=...]                   run every test and case"
	@echo "make test-jax [ARGS=...]                   run the quick ones of the Keras backend's work on JAX"
	@echo "make soak  [ARGS=...]                      the long forms of the tests of kills, faults and inputs, then 45 minutes in one process"
	@echo "make bench [ARGS=...]                      run every benchmark in its short form (benchmarks/README.md)"
	@echo "make check-gpu [DEVICE=gpu]                check and time the package on an accelerator, on both backends"
	@echo "make docs                                  build the documentation into docs/html"
	@echo "make notebooks                             make the notebooks in colab from the scripts beside them"
	@echo "make lint                                  check style and formatting with ruff"
	@echo "make clean                                 remove $(VENV) and the build and test leftovers (runs/ stays)"
	@echo "The first call makes $(VENV) and installs into it; PYTHON=... names the Python (3.11, 3.12 or 3.13) to use."

train: $(INSTALLED)
	$(VENV_PYTHON) training/train.py --recipe $(RECIPE) $(ARGS)

study: $(INSTALLED)
	$(VENV_PYTHON) training/study.py --data_dir "$(DATA_DIR)" $(if $(filter short,$(STUDY)),--short) $(ARGS)

test: $(INSTALLED)
	$(VENV_PYTHON) -m pytest $(IN_PARALLEL) $(ARGS)

test-all: $(INSTALLED)
	$(VENV_PYTHON) -m pytest --all $(IN_PARALLEL) $(ARGS)

test-jax: $(INSTALLED_JAX)
	KERAS_BACKEND=jax $(VENV_PYTHON) -m pytest $(IN_PARALLEL) $(TESTS_OF_BACKENDS) $(ARGS)

soak: $(INSTALLED)
	$(VENV_PYTHON) -m pytest --soak $(IN_PARALLEL) $(LONG_TESTS)
	$(VENV_PYTHON) tests/soak.py $(ARGS)

bench: $(INSTALLED)
	@for name in $(BENCHMARKS); do $(VENV_PYTHON) benchmarks/$$name.py --short $(ARGS) || exit 1; done

# On a GPU install the extra `gpu`, or JAX's own, into $(VENV) first: both are large.
check-gpu: $(INSTALLED_JAX)
	$(VENV_PYTHON) benchmarks/accelerator.py --device $(DEVICE) $(ARGS)

docs: $(INSTALLED_DOCS)
	$(VENV_PYTHON) -m sphinx --fail-on-warning --keep-going --quiet docs docs/html
	@echo "Open docs/html/index.html"

notebooks: $(INSTALLED)
	$(VENV_PYTHON) colab/build.py

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

$(INSTALLED): pyproject.toml setup.py
	@if ! $(VENV_PYTHON) -c "$(SUITABLE)" 2>/dev/null; then \
		python=; \
		for candidate in $(CANDIDATES); do \
			if "$$candidate" -c "$(SUITABLE)" 2>/dev/null; then python="$$candidate"; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "No suitable Python among: $(CANDIDATES)."; \
			echo "Python 3.11, 3.12 and 3.13 work (on Debian and Ubuntu with the package python3-venv)."; \
			echo "Install one of them, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; \
			exit 1; \
		fi >&2; \
		echo "Making $(VENV) with $$("$$python" --version)."; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@echo "Installing elita_tf and its dependencies into $(VENV); this takes minutes the first time."
	@$(VENV_PYTHON) -m pip install --quiet --no-input --disable-pip-version-check --editable ".[test]"
	@touch $@

$(INSTALLED_JAX): $(INSTALLED)
	@$(VENV_PYTHON) -m pip install --quiet --no-input --disable-pip-version-check --editable ".[test,jax]"
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@$(VENV_PYTHON) -m pip install --quiet --no-input --disable-pip-version-check --editable ".[test,docs]"
	@touch $@

clean:
	rm -rf $(VENV) docs/html docs/recipe_keys.md build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
