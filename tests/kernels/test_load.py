"""Many calls, several threads, forked workers, and folders in which the extension cannot be built."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import distances, features, value_and_gradient
from torch.utils.data import DataLoader, Dataset

from srpkd.kernels import Relation, build, native, unavailable_reason

CPU = torch.device("cpu")
BACKENDS = [name for name in ("reference", "blocked", "closed_form", "native") if unavailable_reason(name, CPU) is None]
pytestmark = pytest.mark.usefixtures("one_thread")


def kibibytes() -> int:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.core(0)
def test_memory_does_not_grow() -> None:
    """Over 10,000 calls of all backends: leaking the features or a workspace would take at least 50 MB."""
    pairs = {name: features(batch=1, pixels=48, channels=(12, 16), dtype=torch.float32) for name in BACKENDS}
    relations = {name: Relation("row", distances(name)[0]) for name in BACKENDS}

    def call(times: int) -> None:
        for _ in range(times):
            for name, pair in pairs.items():
                value_and_gradient(*pair, relations[name], name)

    call(250)
    before = kibibytes()
    call(10_000 // len(BACKENDS))
    assert kibibytes() - before < 8 * 1024


def test_eight_threads_at_once() -> None:
    """Each thread gets its own result, bit for bit. The sizes differ, so that no two threads do the same work."""
    jobs = [
        (*features(batch=1 + i % 2, pixels=20 + 37 * (i % 5), channels=(5, 7), dtype=torch.float32), Relation(d), name)
        for i in range(8)
        for d in ("row", "cosine")
        for name in BACKENDS
        if "l1" in distances(name)
    ]
    expected = [value_and_gradient(*job) for job in jobs]

    def calls(worker: int) -> bool:
        torch.set_num_threads(1)
        mine = [(i + worker) % len(jobs) for i in range(len(jobs))]
        return all(
            torch.equal(one, other) for i in mine for one, other in zip(value_and_gradient(*jobs[i]), expected[i])
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8), timeout=240))


class Losses(Dataset):
    """A dataset whose workers use the backend that their parent has already used."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.pairs = [features(batch=1, pixels=130, channels=(5, 7), dtype=torch.float32) for _ in range(4)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return value_and_gradient(*self.pairs[index], Relation("row", "l1"), self.backend)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if "l1" in distances(name)])
@pytest.mark.core(1)
def test_forked_workers(backend: str) -> None:
    """In a process of its own, because autograd refuses to fork once other tests have started its threads."""
    command = [sys.executable, "-c", f"import test_load; test_load.compare_forked_workers({backend!r})"]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare_forked_workers(backend: str) -> None:
    """Forked workers do not wait for threads of their parent, and give the same bits."""
    data = Losses(backend)
    torch.set_num_threads(2)
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    torch.set_num_threads(1)
    alone = [data[i] for i in range(len(data))]
    for one, other, wide in zip(loader, alone, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wide)
    assert torch.equal(data[0], alone[0])  # nor is anything of the parent's lost


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide an extension that is installed."""
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    native.load_existing.cache_clear()
    yield
    native.load_existing.cache_clear()


def test_cache_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_extension: None) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    message = r"cannot be built in \S*file\S*srpkd_\w+: .*; set TORCH_EXTENSIONS_DIR to a folder"
    with pytest.raises(build.BuildError, match=message):
        build.build()


def test_home_of_another_user(monkeypatch: pytest.MonkeyPatch, no_extension: None) -> None:
    """As in a container that runs as another user than root, and has root's home."""

    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(build, "cached_library", lambda: Path("/root/.cache/_native.so"))
    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(os, "stat", refuse)
    assert native.load_existing() == (None, None)
    assert not native.is_built(CPU)


def test_an_extension_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_extension: None) -> None:
    monkeypatch.setattr(build, "cached_library", lambda: tmp_path)  # a folder: root can read all files
    assert native.load_existing() == (None, f"{tmp_path} cannot be read: Is a directory")
    assert not native.is_built(CPU)


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch, no_extension: None) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    reason = "this user has no home directory: set HOME, or TORCH_EXTENSIONS_DIR to a folder"
    assert native.load_existing() == (None, reason)
    assert not native.is_built(CPU)
    with pytest.raises(RuntimeError, match=f"not available: {reason}"):
        native.extension()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    assert build.cached_library().parent.parent == Path("/elsewhere")
