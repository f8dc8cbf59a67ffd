"""What is built from a checkout, from an sdist, and from an archive without symbolic links; and that it works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from srpkd import __version__

ROOT = Path(__file__).resolve().parents[1]
LINKS = {"srpkd/kernels": "../kernels", "srpkd/csrc": "../csrc"}
COMPUTE = (
    "import torch, srpkd, srpkd.kernels, srpkd.kernels.triton.tiles; print(srpkd.__file__, srpkd.kernels.__file__);"
    "print(srpkd.relation_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 3, 3, 3), normalize='cosine').item())"
)

pytestmark = pytest.mark.slow


def tracked_files() -> list[str]:
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        names = ""
    if not names:
        pytest.skip("this is a copy that git does not track")
    return [name for name in names.strip("\0").split("\0") if os.path.lexists(ROOT / name)]


def copy_tree(target: Path, links: bool) -> Path:
    """Copy the tracked files; without ``links`` as archives without symbolic links hold them: text files."""
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() and not links:
            (target / name).write_text(os.readlink(ROOT / name))
        else:
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def build(source: Path, kind: str) -> Path:
    """Build a "wheel" or an "sdist" of a source tree as pip does, without the C++ extension; return its path."""
    code = f"from setuptools.build_meta import build_{kind} as build; print(build('dist'))"
    result = run([sys.executable, "-c", code], cwd=source, SRPKD_BUILD="0")
    return source / "dist" / result.splitlines()[-1]


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command that does not see this checkout; return what it prints."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SRPKD_"))}
    result = subprocess.run(command, cwd=cwd, env=outside | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def wheel_content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("checkout"), links=True)


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    return build(checkout, "wheel")


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    return build(checkout, "sdist")


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of a new environment that has this one's packages, but not srpkd."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    # a path in a .pth file gives access to packages, and leaves the .pth files there unread: among them that of an
    # editable installation of srpkd
    (site / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, *map(str, arguments)]
    run(command, cwd, SRPKD_BUILD="0")


def test_wheel_has_every_module_source_and_data_file(wheel):
    content = wheel_content(wheel)
    expected = {name for name in tracked_files() if name.startswith("srpkd/")} - set(LINKS)
    expected |= {f"srpkd/{name}" for name in tracked_files() if name.startswith(("kernels/", "csrc/"))}
    assert expected == {name for name in content if ".dist-info/" not in name}
    assert {"srpkd/py.typed", "srpkd/presets/demo.yaml", "srpkd/reporting/templates/index.html.j2"} <= expected
    assert {"srpkd/kernels/triton/tiles.py", "srpkd/csrc/bindings.cpp"} <= expected
    assert any(name.endswith("/LICENSE") for name in content)


def test_sdist_has_the_sources_and_no_tests_or_benchmarks(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "kernels/dispatch.py", "csrc/bindings.cpp", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "bench", "docs"))]


def test_wheel_of_the_sdist_is_the_same(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert wheel_content(build(source, "wheel")) == wheel_content(wheel)


def test_wheel_of_an_archive_without_links_is_the_same(wheel, tmp_path):
    source = copy_tree(tmp_path, links=False)
    assert {name: (source / name).read_text("utf-8") for name in LINKS} == LINKS
    assert wheel_content(build(source, "wheel")) == wheel_content(wheel)


def test_wheel_works_in_a_new_environment(wheel, python, tmp_path):
    install(python, wheel, cwd=tmp_path)
    package, kernels, loss = run([str(python), "-c", COMPUTE], tmp_path).split()
    assert Path(package).is_relative_to(tmp_path / "venv") and Path(kernels).parents[1] == Path(package).parent
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert run([str(python.parent / "srpkd"), "--version"], tmp_path).split()[-1] == __version__
    sources = "from srpkd.kernels import build; print(all(source.exists() for source in build.sources(True)))"
    assert run([str(python), "-c", sources], tmp_path).strip() == "True"


@pytest.mark.parametrize("links", [True, False], ids=["checkout", "archive without links"])
@pytest.mark.core(1)
def test_editable_installation_works(links, python, tmp_path):
    source = copy_tree(tmp_path / "source", links)
    install(python, "--editable", source, cwd=tmp_path)
    package, kernels, loss = run([str(python), "-c", COMPUTE], tmp_path).split()
    assert Path(package) == source / "srpkd" / "__init__.py"
    assert Path(kernels).resolve() == source / "kernels" / "__init__.py"
    assert float(loss) == pytest.approx(0, abs=1e-6)
