"""The recorded cases from which ``auto`` chooses on GPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from srpkd.kernels import Relation, auto_backend, build, cuda_device, dispatch, measured, native
from srpkd.kernels.measured import (
    KERNEL_VERSIONS,
    Case,
    Recorded,
    Time,
    difference,
    ranking,
)

H100 = ("NVIDIA H100 80GB HBM3", (9, 0))
GPUS = {  # name, compute capability, multiprocessors, bytes of shared memory for a block
    "h100": cuda_device.Gpu(*H100, 132, 232_448),
    "slice of an h100": cuda_device.Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 16, 232_448),
    "h200": cuda_device.Gpu("NVIDIA H200", (9, 0), 132, 232_448),
    "a100": cuda_device.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912),
    "rtx 3060": cuda_device.Gpu("NVIDIA GeForce RTX 3060", (8, 6), 28, 101_376),
    "l4": cuda_device.Gpu("NVIDIA L4", (8, 9), 58, 101_376),
    "b200": cuda_device.Gpu("NVIDIA B200", (10, 0), 148, 232_448),
    "rtx 5090": cuda_device.Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 101_376),
}
CASE = Case("bfloat16", "highest", "row", "l1", True, 4096, 64, 256, 16)


@pytest.fixture
def use_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.device]:
    """Return a function: a name in GPUS, architectures of the extension -> a device on which every backend runs."""
    for name in dispatch.GPU_BACKENDS:
        monkeypatch.setattr(dispatch.backend_module(name), "unavailable_reason", lambda device: None)
    monkeypatch.setattr(native, "is_built", lambda device: True)

    def use(name: str, architectures: str = build.DEFAULT_ARCHITECTURES) -> torch.device:
        monkeypatch.setattr(cuda_device, "gpu_of", lambda device: GPUS[name])
        if (module := native.load_existing()[0]) is not None:
            monkeypatch.setattr(module, "cuda_architectures", architectures)
        return torch.device("cuda", 0)

    return use


@pytest.fixture
def gpu(use_gpu: Callable[..., torch.device]) -> torch.device:
    return use_gpu("h100")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """Return a function that replaces the recorded cases by cases of several GPUs: name, capability -> times."""

    def record(devices: dict[tuple[str, tuple[int, int]], list[tuple[Case, dict[str, float]]]]) -> None:
        entries = [
            Recorded(index, case, {name: Time(time, KERNEL_VERSIONS[name]) for name, time in times.items()})
            for index, cases in enumerate(devices.values())
            for case, times in cases
        ]
        monkeypatch.setattr(measured, "DEVICES", tuple(devices))
        monkeypatch.setattr(measured, "RECORDED", tuple(entries))
        ranking.cache_clear()

    yield record
    ranking.cache_clear()


@pytest.mark.parametrize("normalize", ["row", "cosine", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_closed_form_for_l2(normalize: str, dtype: torch.dtype, use_gpu) -> None:
    for name in GPUS:
        for batch in (1, 16):
            found = auto_backend(use_gpu(name), Relation(normalize, "l2"), dtype, 4096, (64, 256), batch, "high")
            assert found == "closed_form", name
    gpu = use_gpu("h100")
    constant = Relation(normalize, "l2", detach_norms=True)  # for "row" without kernels of the closed form
    assert (auto_backend(gpu, constant, dtype) == "closed_form") == (normalize != "row")
    assert auto_backend(gpu, Relation(normalize, "l2"), torch.float64) == "closed_form"  # no kernels
    assert auto_backend(gpu, Relation(normalize, "l1"), torch.float64) == "blocked"


def test_the_recorded_times_decide(gpu: torch.device, recorded) -> None:
    l2, single = CASE._replace(distance="l2"), CASE._replace(dtype="float32")
    recorded(
        {
            H100: [
                (CASE, {"native": 1.0, "triton": 2.0}),
                (CASE._replace(batch=1), {"native": 2.0, "triton": 1.0}),
                (l2, {"closed_form": 1.0, "native": 2.0, "triton": 3.0}),
                (single._replace(precision="high"), {"native": 2.0, "triton": 1.0}),
                (single._replace(precision="highest"), {"native": 1.0, "triton": 2.0}),
            ]
        }
    )
    row_l1, dtype = Relation("row", "l1"), torch.bfloat16
    assert auto_backend(gpu, row_l1, dtype, 4096, (64, 256), 16) == "native"
    assert auto_backend(gpu, row_l1, dtype, 4096, (64, 256), 1) == "triton"
    assert auto_backend(gpu, row_l1, dtype, 4096, (64, 256), 3) == "triton"  # a factor of 3 from 1, more than 5 from 16
    assert auto_backend(gpu, row_l1, dtype, 4096, (64, 256), 5) == "native"
    assert auto_backend(gpu, Relation("cosine", "huber"), dtype, 3000, (32, 300), 20, need_grad=False) == "native"
    assert auto_backend(gpu, Relation("row", "l2"), dtype, 4096, (64, 256), 1) == "closed_form"
    assert auto_backend(gpu, row_l1, torch.float32, 4096, (64, 256), 16, "high") == "triton"
    assert auto_backend(gpu, row_l1, torch.float32, 4096, (64, 256), 16, "highest") == "native"


def test_backends_that_cannot_run_are_passed_over(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, recorded) -> None:
    recorded({H100: [(CASE, {"native": 1.0}), (CASE._replace(pixels=256), {"triton": 1.0})]})
    row_l1 = Relation("row", "l1")
    assert auto_backend(gpu, row_l1, torch.bfloat16, 4096, (64, 256), 16) == "native"
    monkeypatch.setattr(native, "is_built", lambda device: False)
    assert auto_backend(gpu, row_l1, torch.bfloat16, 4096, (64, 256), 16) == "triton"
    monkeypatch.setattr(dispatch.backend_module("triton"), "unavailable_reason", lambda device: "missing")
    assert auto_backend(gpu, row_l1, torch.bfloat16, 4096, (64, 256), 16) == "blocked"


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("name", ["h100", "rtx 3060"])
def test_gpus_avoid_large_moments(name: str, distance: str, use_gpu) -> None:
    """With row normalisation of few pixels with many channels, such as the flattened images of a batch."""
    gpu = use_gpu(name)

    def found(normalize: str, pixels: int, channels: tuple[int, int], batch: int = 1) -> str:
        return auto_backend(gpu, Relation(normalize, distance), torch.bfloat16, pixels, channels, batch)

    assert found("row", 64, (4096, 16384)) == "blocked"
    assert found("row", 64, (320, 1280), 32) == "blocked"
    assert found("row", 64, (320, 1280)) != "blocked"  # small matrices
    assert found("row", 4096, (4096, 16384)) != "blocked"
    assert found("cosine", 64, (4096, 16384)) != "blocked"  # no matrices


def test_gpus_without_records_take_those_of_the_nearest_capability(recorded) -> None:
    a100, l4, h200, other = ("A100", (8, 0)), ("L4", (8, 9)), ("H200", (9, 0)), ("H100", (9, 0))
    fastest = {a100: "native", l4: "triton", h200: "triton", other: "closed_form"}
    recorded({gpu: [(CASE, {backend: 1.0})] for gpu, backend in fastest.items()})
    expected = {
        ("A100", (8, 0)): "native", ("H100", (9, 0)): "closed_form", ("GH200", (9, 0)): "triton",
        ("A30", (8, 0)): "native", ("RTX 3060", (8, 6)): "triton", ("RTX 4090", (8, 9)): "triton",
        ("B200", (10, 0)): "triton", ("RTX 5090", (12, 0)): "triton",
    }  # fmt: skip
    assert {gpu: ranking(*gpu, CASE, "sm80")[0] for gpu in expected} == expected
    recorded({})
    assert ranking("H100", (9, 0), CASE, "sm80") == ()


def test_without_records_the_order_of_the_backends_decides(gpu: torch.device, recorded) -> None:
    recorded({})
    assert auto_backend(gpu, Relation("cosine", "l1"), torch.bfloat16) == dispatch.GPU_BACKENDS[0]


def test_cases_that_differ_more_are_farther_away() -> None:
    assert difference(CASE, CASE) == 0
    assert difference(CASE, CASE._replace(pixels=1024)) == difference(CASE._replace(pixels=1024), CASE) == 2
    assert difference(CASE, CASE._replace(student=128, batch=8)) == 2
    less = [
        CASE._replace(dtype="float16"),
        CASE._replace(need_grad=False),
        CASE._replace(normalize="none"),
        CASE._replace(dtype="float32"),
        CASE._replace(distance="l2"),
    ]
    assert [difference(CASE, other) for other in less] == sorted(difference(CASE, other) for other in less)
    single = CASE._replace(dtype="float32")
    assert difference(single, single._replace(precision="high")) > 0
    assert difference(CASE, CASE._replace(precision="high")) == 0  # only affects float32
    assert difference(CASE, CASE._replace(pixels=0)) == 0  # empty features


# --- the sm_90 kernel of native -------------------------------------------------------------------------------------


def test_native_is_ranked_by_the_time_of_its_kernel(recorded) -> None:
    times = {"native": 3.0, "native-sm80": 4.0, "triton": 2.0, "native-sm90": 1.0}
    recorded({H100: [(CASE, times)]})
    assert ranking(*H100, CASE, "sm90") == ("native", "triton")
    assert ranking(*H100, CASE, "sm80") == ("triton", "native")
    recorded({H100: [(CASE, {"native": 3.0, "triton": 2.0})]})
    assert ranking(*H100, CASE, "sm90") == ranking(*H100, CASE, "sm80") == ("triton", "native")


# each counts as verified, see csrc/cuda/verified_rows.h
LARGE = [("row", "l1", torch.bfloat16, 64, 256), ("cosine", "l1", torch.bfloat16, 50, 250)]
LARGE += [("row", "l1", torch.float16, 64, 256), ("row", "l1", torch.bfloat16, 33, 64)]


@pytest.mark.skipif(native.load_existing()[0] is None, reason="the extension is not built")
@pytest.mark.parametrize(("normalize", "distance", "dtype", "student", "teacher"), LARGE)
def test_native_counts_as_fast_only_where_it_takes_the_sm90_kernel(
    normalize: str, distance: str, dtype: torch.dtype, student: int, teacher: int, use_gpu
) -> None:
    """On the H100 its other kernel takes three times as long as ``triton``, which other GPUs must not choose then."""

    def chosen(device: torch.device, **options) -> str:
        arguments = {"pixels": 4096, "channels": (student, teacher), "batch": 16} | options
        return auto_backend(device, arguments.pop("relation", Relation(normalize, distance)), dtype, **arguments)

    for name in GPUS:
        expected = "native" if GPUS[name].capability == (9, 0) else "triton"
        assert chosen(use_gpu(name)) == expected, name
    assert chosen(use_gpu("h100", "8.0+PTX")) == "triton", "an extension without wgmma"
    device = use_gpu("h100")
    other_kinds = {
        "rectify": {"relation": Relation(normalize, distance, rectify=True)},
        "more channels of the teacher": {"channels": (student, teacher + 64)},
        "more channels of the student": {"channels": (student + 64, teacher)},
        "no gradient": {"need_grad": False},
        "huber": {"relation": Relation(normalize, "huber")},
    }
    assert {what: chosen(device, **options) for what, options in other_kinds.items()} == dict.fromkeys(
        other_kinds, "triton"
    )


@pytest.mark.skipif(native.load_existing()[0] is None, reason="the extension is not built")
def test_the_kernel_of_native(monkeypatch: pytest.MonkeyPatch, use_gpu) -> None:
    from bench.record import kind_of, verified_kinds  # here: a GPU machine may lack the packages of the trainer

    use_gpu("h100")
    relation = Relation("row", "l1")
    kernels = {name: native.cuda_kernel(CASE, relation, gpu) for name, gpu in GPUS.items()}
    assert {name for name, kernel in kernels.items() if kernel == "sm90"} == {"h100", "slice of an h100", "h200"}
    verified = verified_kinds(measured.RECORDED)
    for entry in measured.RECORDED:  # the extension's table is that of the recorded rows
        kernel = native.cuda_kernel(entry.case, Relation(entry.case.normalize, entry.case.distance), GPUS["h100"])
        assert (kernel == "sm90") == (kind_of(entry.case) in verified), entry.case
    monkeypatch.setenv("SRPKD_CUDA_KERNEL", "sm80")
    assert native.cuda_kernel(CASE, relation, GPUS["h100"]) == "sm80"
    monkeypatch.setattr(native, "load_existing", lambda: (None, None))
    assert native.cuda_kernel(CASE, relation, GPUS["h100"]) == "sm80"


def test_records_of_earlier_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {name: KERNEL_VERSIONS[name] for name in ("native", "triton")}
    entry = Recorded(0, CASE, {name: Time(1.0, version) for name, version in versions.items()})
    assert measured.stale([entry]) == []
    monkeypatch.setitem(KERNEL_VERSIONS, "triton", versions["triton"] + 1)
    assert measured.stale([entry]) == ["triton"]
    assert measured.stale([entry, Recorded(0, CASE, {"triton": Time(1.0, versions["triton"] + 1)})]) == []
