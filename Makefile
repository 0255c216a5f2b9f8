# make demo   set up, then watch an unguarded run go NaN and a guarded one finish
# make test   set up, then run the tests
# make bench  what watching a step costs, beside the peers; what the log costs to write and to read
# make check  format, lint, types, tests: the one door, also for CI

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := stabilitykit trainers tests benchmarks

export OMP_NUM_THREADS ?= 1

.PHONY: install demo test check nanzoo bench reports clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trainers,test,dev]'
	touch $@

demo: install
	$(BIN)/python -m trainers.demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest

nanzoo: install
	$(BIN)/python -c "import transformers" 2>/dev/null || \
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt transformers
	$(BIN)/python -m benchmarks.origins

bench: install
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.breakdown
	$(BIN)/python -m benchmarks.log

reports: install
	$(BIN)/python -m benchmarks.gallery

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
