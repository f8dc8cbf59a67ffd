# make demo   train, distil and report on generated images
# make test   lint and the whole test suite, and which lines it runs
# make mutations   put faults into the kernels, each of which a test must notice (about ten minutes)
# make sanitize    the C++ under AddressSanitizer and UndefinedBehaviorSanitizer (about three minutes)
# All make .venv first, with everything in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what the installation is made from: a change makes it anew
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*) $(wildcard csrc/*.*)

# Python 3.12 and newer count lines by sys.monitoring, which costs less than a trace function
COUNTED = COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')

.PHONY: demo test mutations sanitize install lint clean

demo: $(VENV)/installed
	$(BIN)/python -m srpkd.train

# the second run has the Triton kernels in Triton's interpreter, which replaces the compiler in its whole process; which
# lines of srpkd/ and kernels/ the two have run is reported at the end
test: $(VENV)/installed lint
	$(COUNTED) $(BIN)/python -m pytest --cov --cov-report=
	$(COUNTED) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton --cov --cov-append --cov-report=term-missing

mutations: $(VENV)/installed
	$(BIN)/python tests/mutations.py

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

# torch comes first: the extension is built against the torch that it will run with
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet torch torchvision ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .coverage .pytest_cache .ruff_cache
