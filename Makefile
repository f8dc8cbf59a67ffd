# make demo   train, distil and report on generated images
# make quick  the fast tests of make test
# make test   lint, types and the test suite, with n cases of each test that is marked core(n)
# make test-all   the same with all cases, and the coverage of the tests that are not slow (about an hour on two cores)
# make mutations   put faults into the code, each of which a test must detect (takes long)
# make sanitize    the C++ under Address-, UndefinedBehavior- and ThreadSanitizer (about four minutes)
# make test-oldest   all tests with the oldest torch that pyproject.toml allows, in .venv-oldest (5 GB)
# make CORE= TARGET   with all cases, not only those of the core
# Every target first creates .venv with all dependencies and the newest torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# sources of the installation, which a change of them repeats
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*) $(wildcard csrc/*/*/*) $(wildcard csrc/*.*)
# of tests that are marked core(n), run n cases
CORE := --core
# further requirements for pip: test-oldest pins some versions
PINS :=
# pytest-xdist: a worker takes over tests from another that still has some, but otherwise runs whole files in order, whose
# fixtures and builds it shares
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
OLDEST := $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# Python 3.12 and newer count lines by sys.monitoring, which costs less than a trace function
COUNTED = COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')

# Containers often set it: every process that a test starts would compile the sources again, which takes a second
unexport PYTHONDONTWRITEBYTECODE

# Triton's interpreter replaces its compiler in the whole process, so that these tests run once more by themselves.
# Coverage would make it take three times as long.
INTERPRETED := tests/kernels/triton/test_interpreter.py tests/kernels/triton/test_closed_form.py \
	tests/kernels/test_far_apart.py

.PHONY: demo quick test test-all suite test-oldest mutations sanitize install lint clean

demo: $(VENV)/installed
	$(BIN)/python -m srpkd.train

quick: $(VENV)/installed
	$(BIN)/python -m pytest $(CORE) -m "not slow" $(PARALLEL)

test: lint
	$(BIN)/python -m pytest $(CORE) $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(CORE) $(INTERPRETED) $(PARALLEL)

test-all: lint suite

suite: $(VENV)/installed
	$(COUNTED) $(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term-missing
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) $(PARALLEL)

# In a copy of the tree, because the extension in this one is built for the torch of .venv. The copy's extension is
# rebuilt every time, the packages stay. Triton 3.6, which torch 2.11 requires, cannot interpret kernels with numpy 2.4.
test-oldest:
	test -n "$(OLDEST)"  # the bound that was found in pyproject.toml
	rm -rf build/oldest .venv-oldest/installed
	mkdir -p build/oldest
	git ls-files -z | xargs -0 cp -pP --parents -t build/oldest
	$(MAKE) -C build/oldest suite VENV=$(CURDIR)/.venv-oldest PINS='"torch==$(OLDEST).*" "numpy<2.4"'

mutations: $(VENV)/installed
	$(BIN)/python tests/mutations.py

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py $(CORE)

lint: $(VENV)/installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types docs dist

# srpkd also with the names that the standard library has on other systems; without the libraries, whose names do not
# depend on it, in 7 s instead of 40
OTHER_SYSTEMS := --follow-imports skip --no-warn-unused-ignores --disable-error-code return --disable-error-code var-annotated
types: $(VENV)/installed
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 $(OTHER_SYSTEMS) -p srpkd
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin $(OTHER_SYSTEMS) -p srpkd

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
