"""Relations beyond one image: scope="batch", and scope="global" over 2 and 3 processes, against one process."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import DELTA, FLAG_SETS, ROOT, error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from srpkd import BackendUnavailable, RelationDistiller, SRPLoss, relation_loss
from srpkd.kernels import DISTANCES, NORMALIZATIONS, Relation, blocked, distributed, native, unavailable_reason

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHARES = (3, 1, 2)  # images of each rank: not the same number, as in the last batch of an epoch


def images(count: int, channels: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    """(B, C_s, 4, 6) and (B, C_t, 4, 6) in float64, with a zero-norm pixel in each."""
    generator = torch.Generator().manual_seed(count)
    student, teacher = (
        torch.randn(count, some, 4, 6, generator=generator, dtype=torch.float64) + 0.5 for some in channels
    )
    student[0, :, 1, 2] = teacher[-1, :, 3, 3] = 0
    return student, teacher


def loss_and_gradient(student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = relation_loss(student, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, student)


@pytest.mark.parametrize("backend", ["auto", "reference", "blocked", "native"])
@pytest.mark.parametrize("scope", ["batch", "global"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_batch_is_one_large_image(normalize: str, scope: str, backend: str) -> None:
    """Without other processes, scope="global" relates the pixels of the batch."""
    if backend != "auto" and (reason := unavailable_reason(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    student, teacher = images(3)
    wide = (x.permute(1, 0, 2, 3).reshape(1, x.shape[1], 12, 6) for x in (student, teacher))
    expected_loss, expected = loss_and_gradient(*wide, normalize=normalize, backend="reference")
    loss, gradient = loss_and_gradient(student, teacher, normalize=normalize, scope=scope, backend=backend)
    assert error(loss, expected_loss) < 1e-12
    assert error(gradient, expected.reshape(5, 3, 4, 6).permute(1, 0, 2, 3)) < 1e-12
    several = loss_and_gradient(student, teacher, normalize=normalize)[0]
    assert error(loss, several) > 1e-3  # it is another thing than the mean over images


def test_reductions_of_a_batch() -> None:
    student, teacher = images(2)
    one = relation_loss(student, teacher, scope="batch", reduction="none")
    assert one.shape == (1,)
    for reduction in ("mean", "sum"):
        assert relation_loss(student, teacher, scope="batch", reduction=reduction) == one[0]


def test_wrong_scope() -> None:
    for call in (lambda: SRPLoss(scope="batches"), lambda: relation_loss(*images(1), scope="batches")):
        with pytest.raises(ValueError, match=r"scope='batches' is not one of .* did you mean 'batch'"):
            call()
    assert "scope='batch'" in repr(SRPLoss(scope="batch"))


@pytest.mark.parametrize(
    ("config", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda"), ("cuda:nccl,cpu:gloo", "cpu")]
)
def test_device_of_small_collectives(monkeypatch: pytest.MonkeyPatch, config: str, device: str) -> None:
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda group: config)
    assert distributed._device_of_collectives(None) == device


# --- several processes ----------------------------------------------------------------------------------------------


def spawn(names: str, ranks: int, folder: Path) -> None:
    """Run cases of this file, separated by commas, in ``ranks`` gloo processes."""
    command = [sys.executable, __file__, names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(ranks)
    ]
    try:
        failures = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, failure in zip(processes, failures):
        assert process.returncode == 0, failure


def test_every_relation_and_parameters_under_ddp(tmp_path: Path) -> None:
    """In the same two processes: to start them takes as long as either test."""
    spawn("relations,channels,ddp", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.core(0)
def test_every_relation_over_three_ranks(tmp_path: Path) -> None:
    spawn("relations", 3, tmp_path)


@pytest.mark.slow
@pytest.mark.core(0)
def test_ranks_with_equal_pixels_and_several_strips(tmp_path: Path) -> None:
    """Only a rank's own columns contain its diagonal, which continues from strip to strip."""
    spawn("strips", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.core(0)
def test_bytes_that_are_exchanged(tmp_path: Path) -> None:
    """Those of docs/several-gpus.md."""
    spawn("traffic", 3, tmp_path)


@pytest.mark.slow
@pytest.mark.core(0)
def test_students_of_a_distiller(tmp_path: Path) -> None:
    spawn("distiller", 2, tmp_path)


@pytest.mark.core(0)
def test_double_backward_over_ranks(tmp_path: Path) -> None:
    spawn("twice", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.core(0)
def test_ranks_with_different_channels(tmp_path: Path) -> None:
    """Every rank raises an error, and none waits forever."""
    spawn("misfit", 2, tmp_path)


@pytest.mark.core(0)
def test_errors_of_one_rank(tmp_path: Path) -> None:
    """Every rank raises the error of one, instead of waiting for it in a collective."""
    spawn("refusal", 2, tmp_path)


def check_relations(rank: int, ranks: int) -> None:
    """Each rank's loss, and the gradient of its pixels, equal those of a single process."""
    first = sum(SHARES[:rank])
    own = slice(first, first + SHARES[rank])
    student, teacher = images(sum(SHARES[:ranks]))
    every = itertools.product(NORMALIZATIONS, DISTANCES, [(), *FLAG_SETS])
    for normalize, distance, flags in every:
        options = {"normalize": normalize, "distance": distance, "delta": DELTA[normalize]} | dict.fromkeys(flags, True)
        expected_loss, expected = loss_and_gradient(student, teacher, scope="batch", backend="reference", **options)
        for backend in backends(distance, *flags):
            options["backend"] = backend
            for layout in (torch.contiguous_format, torch.channels_last):
                mine = [x[own].contiguous(memory_format=layout) for x in (student, teacher)]
                loss, gradient = loss_and_gradient(*mine, scope="global", **options)
                assert error(loss, expected_loss) < 1e-12, options
                assert error(gradient / ranks, expected[own]) < 1e-12, options
                again = loss_and_gradient(*mine, scope="global", **options)
                assert torch.equal(again[0], loss) and torch.equal(again[1], gradient), options
            with torch.autocast("cpu", torch.bfloat16):  # without effect
                loss = relation_loss(*(x.float() for x in mine), scope="global", **options)
                assert error(loss, expected_loss) < 1e-5, options
            narrow = [x[own].bfloat16() for x in (student, teacher)]
            loss = relation_loss(*narrow, scope="global", **options)
            assert loss.dtype == torch.float32
            assert error(loss, expected_loss) < 0.05
    for reduction, shape in (("none", (1,)), ("mean", ()), ("sum", ())):
        assert relation_loss(student[own], teacher[own], scope="global", reduction=reduction).shape == shape
    compiled = torch.compile(SRPLoss(scope="global"), backend="aot_eager")
    assert error(compiled(student[own], teacher[own]), relation_loss(student, teacher, scope="batch")) < 1e-12
    group = torch.distributed.new_group([*range(1, ranks)])  # one of a single rank has its batch alone
    for distance in ("l1", "l2"):
        loss_fn = copy.deepcopy(SRPLoss(distance=distance, scope="global", group=group))
        if rank == 0:
            with pytest.raises(ValueError, match="group does not contain this process"):
                loss_fn(student[own], teacher[own])
        else:
            others = slice(SHARES[0], None)
            expected_loss, expected = loss_and_gradient(
                student[others], teacher[others], distance=distance, scope="batch"
            )
            mine = student[own].clone().requires_grad_()
            loss = loss_fn(mine, teacher[own])
            assert error(loss, expected_loss) < 1e-12
            (gradient,) = torch.autograd.grad(loss, mine)
            assert error(gradient / (ranks - 1), expected[own.start - SHARES[0] : own.stop - SHARES[0]]) < 1e-12


def check_channels(rank: int, ranks: int) -> None:
    """With more channels than pixels, no rank computes or sends C x C matrices."""
    first = sum(SHARES[:rank])
    own = slice(first, first + SHARES[rank])
    distributed.dist.all_reduce, all_reduce = reduced_vectors, distributed.dist.all_reduce
    for channels in ((200, 20), (20, 200), (200, 150)):
        student, teacher = images(sum(SHARES[:ranks]), channels)
        for normalize, distance in itertools.product(NORMALIZATIONS, DISTANCES):
            options = {"normalize": normalize, "distance": distance, "delta": DELTA[normalize]}
            expected_loss, expected = loss_and_gradient(student, teacher, scope="batch", backend="reference", **options)
            loss, gradient = loss_and_gradient(student[own], teacher[own], scope="global", **options)
            assert error(loss, expected_loss) < 1e-12, options
            assert error(gradient / ranks, expected[own]) < 1e-12, options
    distributed.dist.all_reduce = all_reduce


def reduced_vectors(tensor: Tensor, **options) -> None:
    """``all_reduce`` of as many elements as a matrix of 20 channels has, at most."""
    assert tensor.numel() <= 20 * 20
    torch.distributed.distributed_c10d.all_reduce(tensor, **options)


def backends(distance: str, *flags: str) -> list[str]:
    """The backends that can be named for several ranks, "auto" among them."""
    choices = distributed.backend_choices(Relation(distance=distance, **dict.fromkeys(flags, True)), CPU)
    return [name for name in choices if name == "auto" or unavailable_reason(name, CPU) is None]


def check_strips(rank: int, ranks: int) -> None:
    blocked.strip_rows = lambda *_: 7
    native.TILE = 16
    student, teacher = images(ranks)
    own = slice(rank, rank + 1)
    for normalize in NORMALIZATIONS:
        options = {"normalize": normalize, "distance": "huber", "delta": DELTA[normalize]}
        expected_loss, expected = loss_and_gradient(student, teacher, scope="batch", backend="reference", **options)
        for backend in backends("huber"):
            loss, gradient = loss_and_gradient(student[own], teacher[own], scope="global", backend=backend, **options)
            assert error(loss, expected_loss) < 1e-12, options
            assert error(gradient / ranks, expected[own]) < 1e-12, options


def check_traffic(rank: int, ranks: int) -> None:
    """Count the elements of reduced matrices, and the bytes that are sent around the ring."""
    reduced, sent = [], []
    all_reduce, batch_isend_irecv = distributed.dist.all_reduce, distributed.dist.batch_isend_irecv

    def counting_all_reduce(tensor: Tensor, **options) -> None:
        if tensor.ndim == 3 and min(tensor.shape[1:]) > 1:
            reduced.append(tensor)
        all_reduce(tensor, **options)

    def counting_transfers(transfers: list) -> list:
        sent.extend(transfer.tensor for transfer in transfers if transfer.op is distributed.dist.isend)
        return batch_isend_irecv(transfers)

    distributed.dist.all_reduce, distributed.dist.batch_isend_irecv = counting_all_reduce, counting_transfers
    pixels, total = 24, 24 * ranks
    every = itertools.product(((5, 7), (80, 5), (5, 80)), ("l1", "l2"), NORMALIZATIONS, ("auto", "blocked"))
    for (C_s, C_t), distance, normalize, backend in every:
        reduced.clear(), sent.clear()
        student, teacher = (x.bfloat16() for x in images(1, (C_s, C_t)))
        loss_and_gradient(student, teacher, normalize=normalize, distance=distance, scope="global", backend=backend)
        elements = bytes_of_pixel = 0
        if backend == "auto" and distance == "l2" and total >= 4 * (C_s + C_t):
            elements = C_s**2 + C_s * C_t + C_t**2 + (2 * C_s**2 + C_s * C_t if normalize == "row" else 0)
        else:
            bytes_of_pixel = 2 * (C_s + C_t) + (0 if normalize == "none" else 8)
            if normalize == "row":
                elements = (2 * C_s**2 if total > C_s else 0) + (C_t**2 if total > C_t else 0)
                bytes_of_pixel += (0 if total > C_s else 8 * C_s + 4) + (0 if total > C_t else 4 * C_t)
        assert sum(x.numel() for x in reduced) == elements
        assert {x.dtype for x in reduced} <= {torch.float32 if bytes_of_pixel else torch.float64}
        assert sum(x.nbytes for x in sent) == pixels * bytes_of_pixel * (ranks - 1)


def check_ddp(rank: int, ranks: int) -> None:
    """DistributedDataParallel averages the ranks' gradients to the gradient of one process with the whole batch."""
    network = nn.Conv2d(7, 5, 1).double()
    _, teacher = images(4)
    own = slice(2 * rank, 2 * rank + 2)
    for distance in ("l1", "l2"):
        expected = torch.autograd.grad(
            relation_loss(network(teacher), teacher, distance=distance, scope="batch"), list(network.parameters())
        )
        parallel = DistributedDataParallel(network)
        network.zero_grad()
        relation_loss(parallel(teacher[own]), teacher[own], distance=distance, scope="global").backward()
        for parameter, gradient in zip(network.parameters(), expected):
            assert error(parameter.grad, gradient, least=1e-6) < 1e-10


def check_distiller(rank: int, ranks: int) -> None:
    """A student of a distiller may be wrapped by DistributedDataParallel, or sharded by either FSDP."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # here, since it takes time

    student, large = (nn.Sequential(nn.Conv2d(7, width, 1), nn.Conv2d(width, 3, 1)).double() for width in (5, 6))
    _, batch = images(4)
    own = batch[2 * rank : 2 * rank + 2]
    layers, loss_fn = {"0": "0", "1": "1"}, SRPLoss(scope="global")
    expected = torch.autograd.grad(
        RelationDistiller(student, large, layers, SRPLoss(scope="batch"))(batch)[2], list(student.parameters())
    )

    def fsdp(network: nn.Module) -> FullyShardedDataParallel:
        network[0] = FullyShardedDataParallel(network[0], device_id=CPU, use_orig_params=True)
        return FullyShardedDataParallel(network, device_id=CPU, use_orig_params=True)

    for wrap in (DistributedDataParallel, fully_shard, fsdp):
        wrapped = wrap(copy.deepcopy(student))
        RelationDistiller(wrapped, large, layers, loss_fn)(own)[2].backward()
        full = (
            nullcontext() if wrap is not fsdp else FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True)
        )
        with full:
            for parameter, gradient in zip(wrapped.parameters(), expected, strict=True):
                found = parameter.grad.full_tensor() if wrap is fully_shard else parameter.grad
                assert error(found, gradient, least=1e-6) < 1e-10


def check_twice(rank: int, ranks: int) -> None:
    """Differentiating twice raises an error: a gradient penalty must not silently lose the relation loss."""
    student, teacher = images(1)
    for distance in ("l1", "l2"):
        loss = relation_loss(student.requires_grad_(), teacher, distance=distance, scope="global")
        (gradient,) = torch.autograd.grad(loss + student.pow(3).sum(), student, create_graph=True)
        with pytest.raises(RuntimeError, match="does not support double backward"):
            gradient.square().sum().backward()


def check_misfit(rank: int, ranks: int) -> None:
    student, teacher = images(1)
    expected = r"same channels, dtype and device type, .*; received on rank 0 C_s=5; on rank 1 C_s=4$"
    with pytest.raises(ValueError, match=expected):
        relation_loss(student[:, : 5 - rank], teacher, scope="global")
    # without the error, the first loss would be a mixture of two, and the second call would wait forever
    for other in ("huber", "l2"):
        message = rf"received on rank 0 distance='l1'; on rank 1 distance='{other}'$"
        with pytest.raises(ValueError, match=message):
            relation_loss(student, teacher, scope="global", distance=("l1", other)[rank])
    with pytest.raises(ValueError, match=r"on rank 0 student.requires_grad=True; on rank 1 student.requires_grad=Fal"):
        relation_loss(student.requires_grad_(rank == 0), teacher, scope="global", normalize="row")
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"received on rank 0 backend='auto'; on rank 1 backend='blocked'$"):
        relation_loss(student, teacher, scope="global", backend=("auto", "blocked")[rank])
    relation_loss(student, teacher, scope="global", distance="l1", backend=("auto", "blocked")[rank])  # all send alike
    strips = "'native', 'blocked'"
    for distance, rectify, wrong, right in (
        ("l1", False, "reference", strips),
        ("l1", False, "closed_form", strips),
        ("l2", False, "reference", f"'closed_form', {strips}"),
        ("l2", True, "closed_form", strips),
    ):
        with pytest.raises(
            ValueError,
            match=f"distance='{distance}' and rectify={rectify}, backend='{wrong}' is not one of 'auto', {right}",
        ):
            relation_loss(student, teacher, distance=distance, rectify=rectify, scope="global", backend=wrong)
    with pytest.raises(ValueError, match="columns=4 with scope='global' works in one process only"):
        relation_loss(student, teacher, distance="l1", scope="global", columns=4)


def check_refusal(rank: int, ranks: int) -> None:
    """Rank 1 cannot compute the loss: for its backend, its options or its features."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh  # here, since it takes time

    student, teacher = images(2)
    l1 = {"distance": "l1"}
    sharded = DTensor.from_local(teacher, init_device_mesh("cpu", (ranks,)), [Shard(0)])
    cases: list[tuple[type[Exception], str, Tensor, Tensor, dict]] = [
        (ValueError, "backend='triton' is not one of", student, teacher, l1 | {"backend": "triton"}),
        (ValueError, "backend='reference' is not one of", student, teacher, {"backend": "reference"}),
        (ValueError, "columns=4 .* works in one process only", student, teacher, l1 | {"columns": 4}),
        (ValueError, "student features are empty", student[:0], teacher[:0], {}),
        (ValueError, "may differ only in C, but differ in the batch", student[:1], teacher, {}),
        (TypeError, "teacher features are torch.int64", student, teacher.long(), {}),
        (ValueError, "teacher features require a gradient", student, teacher.clone().requires_grad_(), {}),
        (TypeError, r"teacher features are a DTensor.*\.full_tensor\(\)", student, sharded, {}),
    ]
    for kind, message, *features, options in cases:
        right = {"distance": options.get("distance", "l2")}
        for call in (relation_loss, lambda *features, **options: SRPLoss(**options)(*features)):
            with pytest.raises(kind, match=message if rank == 1 else f"^on rank 1: .*{message}"):
                call(*(features if rank == 1 else (student, teacher)), scope="global", **(options if rank else right))
    # a backend that is not built on rank 1, and an environment variable that only rank 1 has
    native.unavailable_reason = lambda device: "it is not built" if rank == 1 else None
    with pytest.raises(BackendUnavailable, match=r"backend='native' cannot run on cpu: it is not built"):
        relation_loss(student, teacher, scope="global", distance="l1", backend="native")
    loss_fn = SRPLoss(scope="global")
    if rank == 1:
        os.environ["SRPKD_BACKEND"] = "reference"
    with pytest.raises(ValueError, match="backend='reference' is not one of 'auto', 'closed_form'"):
        loss_fn(student, teacher)
    # the ranks still exchange in step
    os.environ.pop("SRPKD_BACKEND", None)
    expected = relation_loss(student, teacher, scope="batch")
    assert error(loss_fn(student[rank:][:1], teacher[rank:][:1]), expected) < 1e-12


def main() -> None:
    names, rank, ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        cases = {
            "relations": check_relations,
            "channels": check_channels,
            "strips": check_strips,
            "traffic": check_traffic,
            "ddp": check_ddp,
            "distiller": check_distiller,
            "twice": check_twice,
            "misfit": check_misfit,
            "refusal": check_refusal,
        }
        for name in names.split(","):
            cases[name](rank, ranks)
    finally:
        torch.distributed.destroy_process_group()
    # without interpreter shutdown, during which a thread of gloo may abort the process: fully_shard keeps them alive
    os._exit(0)


if __name__ == "__main__":
    main()
