# make demo   train, distil and report on generated images
# make test   lint and the whole test suite, and which lines it runs
# make mutations   put faults into the kernels, each of which a test must notice (about ten minutes)
# make sanitize    the C++ under AddressSanitizer and UndefinedBehaviorSanitizer (about three minutes)
# make test-oldest   make test with the oldest torch that pyproject.toml promises, in .venv-oldest (5 GB, 20 minutes)
# All make .venv first, with everything in it and with the newest torch: the newest is what make test tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what the installation is made from: a change makes it anew
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*) $(wildcard csrc/*.*)
# what pip is told beside the packages' names: test-oldest pins some
PINS :=
OLDEST := $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# Python 3.12 and newer count lines by sys.monitoring, which costs less than a trace function
COUNTED = COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')

.PHONY: demo test test-oldest mutations sanitize install lint clean

demo: $(VENV)/installed
	$(BIN)/python -m srpkd.train

# the second run has the Triton kernels in Triton's interpreter, which replaces the compiler in its whole process; which
# lines of srpkd/ and kernels/ the two have run is reported at the end
test: $(VENV)/installed lint
	$(COUNTED) $(BIN)/python -m pytest --cov --cov-report=
	$(COUNTED) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/triton/test_interpreter.py --cov --cov-append --cov-report=term-missing

# In a copy of the tree, lest the extension in this one, built for the torch of .venv, be overwritten; it is built anew
# every time, the packages stay. Triton 3.6, which torch 2.11 brings, cannot interpret kernels with numpy 2.4.
test-oldest:
	test -n "$(OLDEST)"  # the bound that was found in pyproject.toml
	rm -rf build/oldest .venv-oldest/installed
	mkdir -p build/oldest
	git ls-files -z | xargs -0 cp -p --parents -t build/oldest
	$(MAKE) -C build/oldest test VENV=$(CURDIR)/.venv-oldest PINS='"torch==$(OLDEST).*" "numpy<2.4"'

mutations: $(VENV)/installed
	$(BIN)/python tests/mutations.py

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

lint: $(VENV)/installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types docs dist

types: $(VENV)/installed
	$(BIN)/mypy

# the documentation site, in site/; it reads the sources, and needs neither torch nor the installed package
docs: $(BIN)/python
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	    | xargs $(BIN)/python -m pip install --quiet
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# sdist and wheel, in dist/; pure Python: the extension is built on the machine that installs or uses it
dist: $(BIN)/python
	$(BIN)/python -m pip install --quiet build
	SRPKD_BUILD=0 $(BIN)/python -m build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(VENV)/installed

# torch comes first: the extension is built against the torch that it will run with
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision "setuptools>=77" wheel ninja pybind11 numpy $(PINS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info .coverage .pytest_cache .ruff_cache
