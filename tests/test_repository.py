"""The repository as tools see it: the links into srpkd/, names of modules, and plain English."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for folder in ("srpkd", "kernels", "bench") for path in (ROOT / folder).rglob("*.py"))


def git(*arguments: str) -> str:
    """Return git's output for the repository. Skip the test in a copy that git does not track."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        output = ""
    if not output:
        pytest.skip("this is a copy that git does not track")
    return output


@pytest.mark.parametrize("name", ["kernels", "csrc"])
def test_link_is_tracked(name):
    mode, *_ = git("ls-files", "--stage", f"srpkd/{name}").split()
    assert mode == "120000", f"srpkd/{name} is not tracked as a symbolic link"
    assert (ROOT / "srpkd" / name).resolve() == ROOT / name


def test_setuptools_and_ruff_find_the_kernels():
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    assert {"srpkd.kernels", "srpkd.kernels.triton"} <= set(setuptools.find_packages(str(ROOT)))
    pytest.importorskip("ruff", reason="ruff is not installed")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert str(ROOT / "kernels" / "dispatch.py") in files


def test_mypy_finds_the_kernels():
    pytest.importorskip("mypy", reason="mypy is not installed")
    modules = ["srpkd.kernels.formulas", "srpkd.kernels.triton.tiles"]
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir=/dev/null"]
    result = subprocess.run(
        [*command, *(f"--module={name}" for name in modules)], cwd=ROOT, capture_output=True, text=True
    )
    assert f"{len(modules)} source files" in result.stdout, result.stdout + result.stderr
    assert "find module" not in result.stdout


def test_text_files_are_read_as_utf_8():
    """ruff's PLW1514 overlooks a read_text() of an object whose type it cannot infer."""
    names = [name for name in git("ls-files", "*.py").splitlines() if not (ROOT / name).is_symlink()]
    assert [name for name in names if ".read_text" + "()" in (ROOT / name).read_text("utf-8")] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_has_another_name_than_the_packages_that_it_imports(path):
    """Otherwise running the module as a script imports the module itself in place of the package."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.partition(".")[0])
    assert (path.parent.name if path.stem == "__init__" else path.stem) not in imported


def test_ci_tests_the_oldest_versions_that_pyproject_supports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    oldest, newest = jobs["quick"]["strategy"]["matrix"]["include"]
    assert project["requires-python"] == f">={oldest['python']}"
    (torch,) = (requirement for requirement in project["dependencies"] if requirement.startswith("torch"))
    assert f'"{torch.replace(">=", "==")}.*"' in oldest["pins"] and not newest["pins"]
    versions = [text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text]
    assert (versions[0], versions[-1]) == (oldest["python"], newest["python"])


@pytest.mark.parametrize("folder", ["srpkd", "kernels", "csrc", "bench", "tests"])
def test_no_source_file_has_more_than_500_lines(folder):
    sources = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".j2")
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in sources and path.is_file()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > 500}


# with a ~ in each, so that this file does not contain what it searches for
ODD_ENGLISH = "le~st, an~ew, goes~ on, go~ on, but~ for, whatever~ it, hangs~ on, there~of".replace("~", "").split(", ")


def test_plain_english():
    """Words that docs, comments and messages avoid: see the section Style of CONTRIBUTING.md."""
    pattern = re.compile(rf"\b(?:{'|'.join(ODD_ENGLISH)})\b".replace(" ", r"\s+"), re.IGNORECASE)
    found = []
    for name in git("ls-files", "-z").strip("\0").split("\0"):
        path = ROOT / name
        content = b"" if path.is_symlink() or not path.exists() else path.read_bytes()
        if b"\0" in content:  # a picture
            continue
        text = content.decode("utf-8")
        found += [f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)
