"""Backend ``native`` on the CPU, beyond the tests of all backends.

Tiles of every size against float64, determinism for any number of threads, the operator itself, both instruction sets,
and the index arithmetic that CPU and GPU share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    FLAG_SETS,
    NARROW,
    STRIDES,
    assert_equal,
    assert_equal_to_reference,
    cases,
    error,
    features,
    value_and_gradient,
)
from torch import Tensor

from srpkd import relation_loss
from srpkd.kernels import NORMALIZATIONS, Relation, TileSums, formulas, native

CPU = torch.device("cpu")
ROW_L1 = Relation("row", "l1")
every_case = pytest.mark.parametrize(("backend", "relation"), cases(["native"]))


@pytest.fixture(autouse=True)
def _built(one_thread: None) -> None:
    """Build the extension before the first test if necessary, or skip the tests with the reason."""
    if (reason := native.unavailable_reason(CPU)) is not None:
        pytest.skip(f"native: {reason}")
    native.extension()


@pytest.fixture
def threads() -> Iterator[None]:
    """Run a test with two threads."""
    torch.set_num_threads(2)
    yield


def tiles(student: Tensor, teacher: Tensor, relation: Relation, need_grad: bool = True) -> TileSums:
    scales = formulas.scales_of(student, teacher, relation, formulas.accumulator(student.dtype))
    return native.relation_tiles(student, teacher, scales, relation, need_grad)


def through_tiles(student: Tensor, teacher: Tensor, relation: Relation, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """Each image's loss and gradient from the primitive and the formulas in Python, for tiles of any size."""
    loss, gradient = formulas.loss_and_gradient(native.relation_tiles, student, teacher, relation, True)
    return loss, (gradient * upstream).to(student.dtype)


def assert_same_bits(one: TileSums, other: TileSums) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


# --- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "tile"), [(35, 16), (64, 16), (97, 32), (130, 48), (33, 64), (113, 112)])
@every_case
def test_tiles_of_any_size(
    backend: str, relation: Relation, pixels: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete and incomplete last tiles, one tile and many, even and odd numbers of blocks."""
    monkeypatch.setattr(native, "TILE", tile)
    student, teacher = features(relation, pixels=pixels)
    assert_equal(through_tiles(student, teacher, relation), value_and_gradient(student, teacher, relation, "reference"))
    student[:, 5], teacher[:, 17] = 0, 0  # zero-norm pixels, on and off the diagonal
    student[:, 16:32] = 0
    expected = value_and_gradient(student, teacher, relation, "reference")
    assert_equal(through_tiles(student, teacher, relation), expected, slack=10)


def test_a_tile_larger_than_the_image_takes_the_memory_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = features(ROW_L1, pixels=35)
    columns = torch.arange(35).expand(2, 1, -1).contiguous()
    scales = formulas.scales_of(student, teacher, ROW_L1, student.dtype)
    pixels = formulas.Pixels(student, teacher, scales.student, scales.teacher)
    expected = []
    for tile in (48, 2**20, 2**63 - 1):
        monkeypatch.setattr(native, "TILE", tile)
        sampled = native.sampled_loss_and_gradient(student, teacher, ROW_L1, True, columns)
        whole = native.relation_tiles(student, teacher, scales, ROW_L1, True)
        results = [*whole, *native.remote_tiles(pixels, pixels, ROW_L1, True), *sampled]
        expected = expected or results
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", (torch.float64, *NARROW), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_any_strides_in_tiles(
    normalize: str, dtype: torch.dtype, strides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are read in place, or converted to a wider dtype with the same strides."""
    monkeypatch.setattr(native, "TILE", 16)
    relation = Relation(normalize, "l1")
    student, teacher = (x.mT.unflatten(2, (7, 5)).contiguous() for x in features(relation, dtype=dtype))
    view = STRIDES[strides]
    expected, actual = (
        through_tiles(*(x.flatten(2).mT for x in pair), relation)
        for pair in ((student, teacher), (view(student), view(teacher)))
    )
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert error(actual[0], expected[0]) <= tolerance
    assert error(actual[1], expected[1]) <= (torch.finfo(dtype).eps if dtype.itemsize == 2 else tolerance)


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])
@every_case
def test_error_over_many_tiles(
    backend: str, relation: Relation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of sums over many tiles is at most 3 times that of eager PyTorch."""
    monkeypatch.setattr(native, "TILE", 32)
    student, teacher = features(relation, batch=1, pixels=400, channels=(16, 40), dtype=dtype, apart=1e-9)
    exact = value_and_gradient(student.double(), teacher.double(), relation, "reference")
    upstream = 2.0**14 if dtype == torch.float16 else 1.0
    eager = value_and_gradient(student, teacher, relation, "reference", upstream)
    for loss, gradient in (
        through_tiles(student, teacher, relation, upstream),
        value_and_gradient(student, teacher, relation, backend, upstream),
    ):
        floor = torch.finfo(torch.float32).eps
        assert error(loss, exact[0]) <= 3 * error(eager[0], exact[0]) + 4 * floor
        assert error(gradient / upstream, exact[1]) <= 3 * error(eager[1] / upstream, exact[1]) + floor


@every_case
def test_loss_without_gradient_is_bit_identical(
    backend: str, relation: Relation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "TILE", 32)
    for dtype in (torch.float64, *NARROW):
        pair = features(pixels=101, dtype=dtype)
        without = tiles(*pair, relation, need_grad=False)
        assert without.U is None
        assert without.h is None
        assert torch.equal(without.loss, tiles(*pair, relation).loss)


# --- the whole loss -------------------------------------------------------------------------------------------------

# Few pixels from whole matrices in blocks of 64 rows, for row also many if there are many channels; others from tiles,
# whose scales sum 16 channels at a time
SIZES = [(1, 4), (15, 4), (64, 4), (65, 4), (200, 4), (200, 70), (1024, 180), (1100, 40), (1100, 1100)]


@pytest.mark.parametrize(("pixels", "channels_t"), SIZES)
@every_case
def test_whole_loss(backend: str, relation: Relation, pixels: int, channels_t: int) -> None:
    student, teacher = features(None, batch=2, pixels=pixels, channels=(3, channels_t))
    student[:, pixels // 2], teacher[:, pixels // 3] = 0, 0
    assert_equal_to_reference(student, teacher, relation, backend, slack=10)


@pytest.mark.parametrize("pixels", [65, 1100])
@pytest.mark.parametrize(("backend", "relation"), cases(["native"], FLAG_SETS))
def test_whole_loss_with_flags(backend: str, relation: Relation, pixels: int) -> None:
    student, teacher = features(None, batch=1, pixels=pixels, channels=(3, 4))
    student[:, pixels // 2], teacher[:, pixels // 3] = 0, 0
    assert_equal_to_reference(student, teacher, relation, backend, slack=10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("pixels", [40, 1100])
def test_reductions_of_the_operator(pixels: int, reduction: str) -> None:
    student, teacher = features(None, batch=3, pixels=pixels)
    forward = torch.ops.srpkd.relation_loss_forward
    loss, gradient = forward(student, teacher, "row", "l1", 1.0, 1e-12, False, False, reduction, "tiles", True)
    expected_loss, expected = forward(student, teacher, "row", "l1", 1.0, 1e-12, False, False, "none", "tiles", True)
    of_batch = {"mean": expected_loss.mean(), "sum": expected_loss.sum(), "none": expected_loss}
    torch.testing.assert_close(loss, of_batch[reduction], rtol=1e-14, atol=0)
    assert error(gradient, expected / 3 if reduction == "mean" else expected) <= 1e-14


@pytest.mark.parametrize("scale", [1e-18, 1e17])
@pytest.mark.parametrize("pixels", [40, 1100])
def test_features_of_any_magnitude(pixels: int, scale: float) -> None:
    """Squares of row norms would overflow or underflow in float32."""
    student, teacher = features(None, batch=1, pixels=pixels, dtype=torch.float32)
    relation = Relation("row", "l2", eps=0.0)
    expected = value_and_gradient(student, teacher, relation, "native")
    loss, gradient = value_and_gradient(student * scale, teacher * scale, relation, "native")
    assert error(loss, expected[0]) <= 1e-5
    assert error(gradient * scale, expected[1]) <= 1e-5


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_scales_are_exact_at_any_matmul_precision(precision: str, set_precision: Callable[[str], None]) -> None:
    student, teacher = features(None, batch=1, pixels=1100, dtype=torch.float32)
    expected = value_and_gradient(student, teacher, ROW_L1, "native")
    set_precision(precision)
    loss, gradient = value_and_gradient(student, teacher, ROW_L1, "native")
    coarse = 1e-6 if precision == "high" else 1e-2  # products of features may be rounded to bfloat16
    assert error(loss, expected[0]) <= coarse
    assert error(gradient, expected[1]) <= 1e-3 + 10 * coarse


@pytest.mark.parametrize("shape", [(0, 9, 3), (2, 0, 3), (2, 9, 0)], ids=str)
def test_empty_features(shape: tuple[int, ...]) -> None:
    student, teacher = torch.ones(shape), torch.ones(*shape[:2], 4)
    forward = torch.ops.srpkd.relation_loss_forward
    for reduction, size in (("mean", ()), ("sum", ()), ("none", shape[:1])):
        loss, gradient = forward(student, teacher, "row", "l1", 1.0, 1e-12, False, False, reduction, "tiles", True)
        assert torch.equal(loss, torch.zeros(size))
        assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("pixels", "channels"), [(40, (300, 700)), (700, (16, 24)), (1100, (16, 24))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_whole_loss_with_several_threads(
    dtype: torch.dtype, pixels: int, channels: tuple[int, int], batch: int, count: int
) -> None:
    student, teacher = features(None, batch=batch, pixels=pixels, channels=channels, dtype=dtype)
    expected = value_and_gradient(student, teacher, ROW_L1, "native")
    torch.set_num_threads(count)
    first, second = (value_and_gradient(student, teacher, ROW_L1, "native") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert error(first[0], expected[0]) <= 1e-6
    assert error(first[1], expected[1]) <= max(1e-3, torch.finfo(dtype).eps)  # signs near ties


@pytest.mark.parametrize("channels", [(3, 600), (600, 40), (300, 1100)], ids=str)
@pytest.mark.parametrize("pixels", [40, 100])
@every_case
def test_ranges_of_channels(backend: str, relation: Relation, pixels: int, channels: tuple[int, int]) -> None:
    """Threads share the channels of an image with few pixels."""
    student, teacher = features(None, batch=1, pixels=pixels, channels=channels)
    torch.set_num_threads(3)
    assert_equal_to_reference(student, teacher, relation, backend, slack=10)


# --- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "tile"), [(1, 16), (3, 32)])
@every_case
def test_deterministic_for_any_number_of_threads(
    backend: str, relation: Relation, images: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads add to U in the order of the rounds."""
    monkeypatch.setattr(native, "TILE", tile)
    pair = features(batch=images, pixels=250, channels=(8, 12), dtype=torch.float32)
    # once: the bits of the BLAS products in the scales may depend on the number of threads
    scales = formulas.scales_of(*pair, relation, torch.float32)
    expected = native.relation_tiles(*pair, scales, relation, True)
    for count in (2, 2, 2, 3):
        torch.set_num_threads(count)
        assert_same_bits(native.relation_tiles(*pair, scales, relation, True), expected)


def test_deterministic_at_real_size(threads: None) -> None:
    relation = ROW_L1
    student, teacher = features(batch=1, pixels=1500, channels=(64, 96), dtype=torch.float32)
    expected = value_and_gradient(student, teacher, relation, "native")
    for _ in range(5):
        actual = value_and_gradient(student, teacher, relation, "native")
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_bounded() -> None:
    """The operator allocates workspaces of the size of a tile and O(N) memory, not O(N^2)."""
    student, teacher = features(batch=1, pixels=6000, channels=(8, 8), dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tiles(student, teacher, ROW_L1)
    total = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < total < 6000**2 * 4 / 4


# --- the operator ---------------------------------------------------------------------------------------------------


def arguments(dtype: torch.dtype = torch.float32, normalize: str = "row", need_grad: bool = True) -> tuple:
    student, teacher = features(dtype=dtype)
    scales = formulas.scales_of(student, teacher, Relation(normalize, "l1"), formulas.accumulator(dtype))
    return student, teacher, scales.student, scales.teacher, normalize, "l1", 1.0, normalize == "none", need_grad


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("normalize", ["row", "none"])
def test_operator(normalize: str, need_grad: bool) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        values = arguments(dtype, normalize, need_grad)
        torch.library.opcheck(torch.ops.srpkd.relation_tiles.default, values, test_utils="test_schema")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({0: torch.ones(2, 35)}, ValueError, "expected student"),
        ({1: torch.ones(2, 34, 7)}, ValueError, "expected student"),
        ({1: torch.ones(2, 35, 7).double()}, TypeError, "one floating-point dtype"),
        ({2: None}, ValueError, "expected alpha_student"),
        ({3: torch.ones(2, 34)}, ValueError, "expected alpha"),
        ({4: "rows"}, ValueError, "rows"),
        ({5: "l3"}, ValueError, "l3"),
    ],
    ids=str,
)
def test_operator_checks_its_arguments(change: dict, kind: type, message: str) -> None:
    changed = [change.get(index, value) for index, value in enumerate(arguments())]
    with pytest.raises(kind, match=message):
        torch.ops.srpkd.relation_tiles(*changed)


def test_compiles() -> None:
    """torch.compile treats the whole loss as one operator."""
    student, teacher = features(dtype=torch.float32)

    def loss(student: Tensor) -> Tensor:
        return relation_loss(student, teacher, layout="nlc", distance="l1", backend="native")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(student), loss(student))


SAMPLES = """
import itertools
import torch
from srpkd import relation_loss
from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation, formulas, native
torch.set_num_threads(1)
numbers = {}

def images(pixels, dtype):
    return (torch.arange(2 * pixels * c).mul(0.618).frac().sub(0.4).view(2, pixels, c).to(dtype) for c in (5, 6))

native.TILE = 32
student, teacher = images(77, torch.float64)
for normalize in NORMALIZATIONS:
    for distance, rectify in itertools.product(DISTANCES, (False, True)):
        relation = Relation(normalize, distance, 0.1, rectify=rectify)
        scales = formulas.scales_of(student, teacher, relation, torch.float64)
        for need_grad in (True, False):
            tiles = native.relation_tiles(student, teacher, scales, relation, need_grad)
            numbers.setdefault("float64", []).extend(x.norm().item() for x in tiles if x is not None)
native.TILE = 0
for dtype, pixels, by_channel in itertools.product((torch.float32, torch.bfloat16), (9, 77, 130, 1100), (True, False)):
    student, teacher = images(pixels, dtype)
    if by_channel:
        student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
    student.requires_grad_()
    loss = relation_loss(student, teacher, layout="nlc", normalize="row", distance="huber", backend="native")
    (gradient,) = torch.autograd.grad(loss, student)
    numbers.setdefault(str(dtype)[6:], []).extend(x.double().norm().item() for x in (loss, gradient))
instructions = native.extension().cpu_capability()["instructions"]
"""
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-3}


@pytest.mark.parametrize(
    ("capability", "setting"), [("default", ""), ("avx2", ""), ("", "torch.backends.mkldnn.enabled = False")]
)
@pytest.mark.core(1)
def test_other_processors(capability: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors and matrix products for other processors give the results of those for this one."""
    monkeypatch.setattr(native, "TILE", 0)  # SAMPLES sets it: restore it after the test
    samples: dict = {}
    exec(SAMPLES, samples)
    script = f"import torch\n{setting}\n{SAMPLES}\nimport json\nprint(json.dumps([numbers, instructions]))"
    environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": capability} if capability else {})}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    numbers, instructions = json.loads(result.stdout)
    assert not capability or "AVX512" not in instructions
    assert capability != "default" or "AVX2" not in instructions
    for dtype, tolerance in TOLERANCES.items():
        assert numbers[dtype] == pytest.approx(samples["numbers"][dtype], rel=tolerance), dtype


# --- index arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [*range(1, 41), 127, 128])
def test_triangle_map(blocks: int) -> None:
    """Each pair of blocks occurs once; in every round each block occurs once, so that rounds need no atomics."""
    module = native.extension()
    count = module.tile_count(blocks)
    mapped = [module.tile_at(index, blocks) for index in range(count)]
    assert {(row, column) for row, column, _, _ in mapped} == {(i, j) for i in range(blocks) for j in range(i + 1)}
    assert count == blocks * (blocks + 1) // 2
    assert [turn for _, _, turn, _ in mapped] == sorted(turn for _, _, turn, _ in mapped)
    for turn in range(blocks):
        tiles_of_round = [(row, column) for row, column, own, _ in mapped if own == turn]
        assert sorted(block for pair in tiles_of_round for block in set(pair)) == list(range(blocks))
    assert all(mirrored == (row != column) for row, column, _, mirrored in mapped)


def test_triangle_map_of_many_blocks() -> None:
    """No overflow and no rounding, as a map with a floating-point square root would have."""
    module, blocks = native.extension(), 3_000_000_019
    for index in (0, 1, module.tile_count(blocks) // 2, module.tile_count(blocks) - 1):
        row, column, turn, mirrored = module.tile_at(index, blocks)
        assert 0 <= column <= row < blocks
        assert (row + column) % blocks == turn
        assert mirrored == (row != column)


@pytest.mark.parametrize(("pixels", "size"), [(1, 16), (16, 16), (17, 16), (4096, 352), (35, 64)])
def test_blocks_cover_the_pixels(pixels: int, size: int) -> None:
    blocks = [native.extension().block_at(block, size, pixels) for block in range(-(-pixels // size))]
    assert [pixel for begin, count in blocks for pixel in range(begin, begin + count)] == list(range(pixels))


@pytest.mark.parametrize("threads", [1, 2, 16, 128])
@pytest.mark.parametrize("pixels", [1, 64, 1000, 4096, 65536])
def test_tile_size(pixels: int, threads: int) -> None:
    module = native.extension()
    size = module.tile_size(1, pixels, 4, threads)
    assert size % 16 == 0
    assert 16 <= size <= 512
    blocks = -(-pixels // size)
    assert blocks >= 2 * threads or size <= 64
    assert (blocks - 1) * size < pixels
    assert module.tile_size(1, pixels, 8, threads) <= size


# --- GPUs, by faked properties --------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], str], str | None]:
    """Return a function: a capability, architectures of the extension -> why ``native`` cannot run there."""
    module, _ = native.load_existing()
    if module is None:
        pytest.skip("the extension is not built")

    def reason(capability: tuple[int, int], architectures: str) -> str | None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.version, "hip", None)
        # cuda:1 has capability 8.9
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9) if device == 1 else capability)
        monkeypatch.setattr(module, "cuda_architectures", architectures)
        native._can_run.cache_clear()
        return native.unavailable_reason(torch.device("cuda", 0))

    return reason


def test_an_extension_without_code_for_the_gpu_is_not_taken(fake_gpu) -> None:
    """Its first launch would fail: no kernel image is available."""
    assert fake_gpu((8, 6), "8.0+PTX;9.0a") is None
    assert fake_gpu((12, 0), "8.0+PTX;9.0a") is None
    reason = fake_gpu((9, 0), "8.6")
    assert reason == (
        "it was built for the GPU architectures 8.6, and this GPU has 9.0: install srpkd again with "
        "--no-build-isolation and TORCH_CUDA_ARCH_LIST='8.9;9.0'"
    )
    assert not native.is_built(torch.device("cuda", 0))
    # for all GPUs of the machine: a build for this one alone would not run on the others
    assert "TORCH_CUDA_ARCH_LIST='8.9;12.0'" in str(fake_gpu((12, 0), "8.6;9.0a"))
    assert str(fake_gpu((8, 9), "9.0a")).endswith("TORCH_CUDA_ARCH_LIST=8.9")
    assert "compute capability 8.0 or higher, this one has 7.5" in str(fake_gpu((7, 5), "8.0+PTX;9.0a"))


def test_the_reason_for_an_extension_without_cuda_names_the_remedy(fake_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.build, "cuda_unavailable_reason", lambda: "no CUDA toolkit found: set CUDA_HOME")
    assert fake_gpu((8, 6), "") == "it was built without the CUDA part: no CUDA toolkit found: set CUDA_HOME"
    monkeypatch.setattr(native.build, "cuda_unavailable_reason", lambda: None)
    assert str(fake_gpu((8, 6), "")).endswith("install srpkd again with --no-build-isolation")

    def run_nvcc() -> None:
        raise AssertionError("is_built is called for every loss")

    monkeypatch.setattr(native.build, "cuda_unavailable_reason", run_nvcc)
    assert not native.is_built(torch.device("cuda", 0))
