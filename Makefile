# Every target makes .venv from constraints.txt first (about 80 s, once). PYTHON chooses the interpreter: 3.11 or 3.12.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo demo-detection test test-all test-gpu test-ray test-oldest lint loss-curve bench soak clean

demo: $(STAMP)
	$(BIN)/python -m lambdanets demo

# The picture and its masks are data in a wheel of 3 MB, which is unpacked and not installed.
NUCLEI := build/stardist/.downloaded
demo-detection: $(STAMP) $(NUCLEI)
	$(BIN)/python -m lambdanets demo --nuclei $$(ls build/stardist/stardist-0.9.2-*.whl | head -n 1)

$(NUCLEI): | $(STAMP)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: -d build/stardist stardist==0.9.2
	touch $@

test: $(STAMP)
	$(PYTEST) -n $(WORKERS) -m "not slow and not gpu and not ray"

test-all: $(STAMP)
	$(PYTEST) -n $(WORKERS) -m "not gpu and not ray"

test-gpu: $(STAMP)
	$(PYTEST) -m gpu -W default

# Ray is 260 MB, and nothing else needs it.
test-ray: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[ray]'
	$(PYTEST) -m ray

test-oldest:
	printf 'torch==2.11.0\ntorchvision==0.26.0\nnumpy<2.4\n' > .constraints-oldest.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.constraints-oldest.txt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

loss-curve: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/classification/test_loss_curve.py $(ADD)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.op

MINUTES ?= 30
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

clean:
	rm -rf .venv .venv-oldest build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lambdanets needs Python 3.11 or 3.12, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[digits,plots,stream,tensorboard,detection,pseudo,dev]'
	touch $(STAMP)
