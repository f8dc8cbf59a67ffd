"""SRPKD_CUDA_TOGETHER and SRPKD_CUDA_OVERLAP on a GPU: kernels compute the same bits however they are launched.

tests/csrc/test_cuda_launches.py tests which kernels start early, and the emulation of the others in tests/csrc that
they wait before they access results, and which share a launch.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DELTA, features, value_and_gradient
from torch import Tensor

from srpkd.kernels import NORMALIZATIONS, Relation, unavailable_reason

CUDA = torch.device("cuda")
CALLS = 12
KERNELS = ("sm80", "sm90", "closed_form")
SHAPES = {"one": (1, 4096, (64, 256)), "small": (2, 75, (16, 16)), "batch": (8, 1024, (64, 64))}
SETTINGS = list(itertools.product("01", "01"))  # of TOGETHER and OVERLAP; the first is what others are compared with

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _available() -> None:
    if (reason := unavailable_reason("native", CUDA)) is not None:
        pytest.skip(reason)


def select(kernels: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Select kernels. Return the backend and the distance."""
    if kernels == "closed_form":
        return "closed_form", "l2"
    if kernels == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", kernels)
    return "native", "l1"


def launch(together: str, overlap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPKD_CUDA_TOGETHER", together)
    monkeypatch.setenv("SRPKD_CUDA_OVERLAP", overlap)


def run(pairs: list[tuple[Tensor, Tensor]], relation: Relation, backend: str) -> list[Tensor]:
    """Return losses and gradients of calls that follow each other without a pause."""
    upstream = 2.0**14 if pairs[0][0].dtype == torch.float16 else 1.0
    results = [value_and_gradient(*pair, relation, backend, upstream) for pair in pairs]
    return list(itertools.chain.from_iterable(results))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_equal_bits(
    monkeypatch: pytest.MonkeyPatch, kernels: str, normalize: str, dtype: torch.dtype, shape: str
) -> None:
    """The workspace of each call has other contents, those of the call before it."""
    backend, distance = select(kernels, monkeypatch)
    relation = Relation(normalize, distance, DELTA[normalize])
    batch, pixels, channels = SHAPES[shape]
    pairs = [features(None, batch, pixels, channels, dtype, CUDA) for _ in range(CALLS)]
    results = []
    for setting in SETTINGS:
        launch(*setting, monkeypatch)
        results.append(run(pairs, relation, backend))
    for others in results[1:]:
        for x, y in zip(others, results[0]):
            assert torch.equal(x, y)


@pytest.mark.parametrize("setting", SETTINGS[1:], ids="-".join)
@pytest.mark.parametrize("kernels", KERNELS)
def test_cuda_graphs(monkeypatch: pytest.MonkeyPatch, kernels: str, setting: tuple[str, str]) -> None:
    """A graph that is captured with the settings, and replayed for other features."""
    backend, distance = select(kernels, monkeypatch)
    normalize = "cosine" if kernels == "closed_form" else "row"  # whose kernels share launches
    relation = Relation(normalize, distance, DELTA[normalize])
    first, second = (features(None, 2, 1024, (64, 128), torch.bfloat16, CUDA) for _ in range(2))
    launch(*SETTINGS[0], monkeypatch)
    expected = run([second], relation, backend)
    launch(*setting, monkeypatch)
    static = tuple(x.detach().clone() for x in first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run([static], relation, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run([static], relation, backend)
    for to, value in zip(static, second):
        to.copy_(value)
    for _ in range(CALLS):
        graph.replay()
        for x, y in zip(results, expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["SRPKD_CUDA_TOGETHER", "SRPKD_CUDA_OVERLAP"])
def test_other_values_are_rejected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(ValueError, match=f'{name}="yes": expected 1'):
        run([features(None, 1, 64, (8, 8), torch.bfloat16, CUDA)], Relation("row", "l1"), "native")
