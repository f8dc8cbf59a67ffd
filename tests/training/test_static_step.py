"""Steps on static inputs, and CUDA graphs of them, give the results of steps without."""

import copy
import math
import random
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from small import SIZE, SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srpkd.training import loop
from srpkd.training.loop import freeze_for_inference, make_objective
from srpkd.training.objectives import Objective
from srpkd.training.options import TrainConfig
from srpkd.training.static_step import StaticStep, uncapturable_reason

STEPS = 9
CASES: dict[str, dict[str, Any]] = {
    "cycle_gan": {},
    "pix2pix": {"model": "pix2pix"},
    "batch norm and dropout": {"norm": "batch", "no_dropout": False},
    "everything": {"ema": 0.7, "clip_grad_norm": 0.5, "channels_last": True, "lambda_feature": 1.0},
    "bf16": {"precision": "bf16", "ema": 0.7},
    "fp16": {"precision": "fp16", "clip_grad_norm": 0.5},
    "row l1": {"normalize": "row", "distance": "l1"},
    "pools of one image": {"pool_size": 1, "batch_size": 1},
}


def make(others: dict[str, Any], device: str = "cpu") -> Objective:
    """A student of one teacher, small enough for many steps, with pools that are soon full."""
    options = SMALL | {"model": "cycle_gan", "ngf": 4, "ndf": 4, "lr": 0.01, "init_gain": 0.2, "pool_size": 3}
    config = TrainConfig(**options | {"device": device} | others).resolved()
    direction = "G" if config.model == "pix2pix" else "G_A"
    teacher = make_objective(config, 1, {}).generators[direction]
    return make_objective(config, 0, {direction: freeze_for_inference(teacher, config)})


def make_static(others: dict[str, Any], device: str = "cpu") -> Objective:
    """The same with static inputs, and on a GPU with a CUDA graph of its steps."""
    objective = make(others, device)
    objective.run_step = StaticStep(objective.take_step, objective.config.torch_device)
    return objective


def batches(objective: Objective) -> list[dict[str, Tensor]]:
    """Images of every step; those of two steps are not finite, the first before a pool is full."""
    rng = torch.Generator().manual_seed(0)
    config = objective.config
    shape = config.batch_size, 3, SIZE, SIZE
    images = [{side: torch.rand(shape, generator=rng) * 2 - 1 for side in "AB"} for _ in range(STEPS)]
    images[1]["A"][0] = math.nan
    images[6]["B"][0] = math.inf
    return [
        {side: image.to(config.torch_device, memory_format=config.memory_format) for side, image in batch.items()}
        for batch in images
    ]


def train(objective: Objective) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Losses of every step, and the state after the last one."""
    torch.manual_seed(5)
    random.seed(5)
    losses = []
    for number, batch in enumerate(batches(objective)):
        losses.append({name: float(loss) for name, loss in objective.step(batch).items()})
        objective.optimizers.set_lr(0.01 / (number + 2))
    return losses, copy.deepcopy((objective.state_dict(), objective.rank_state_dict()))


def assert_same_bits(objective: Objective, others: dict[str, Any]) -> None:
    expected, found = train(make(others, str(objective.config.torch_device))), train(objective)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert objective.optimizers.skipped == 2 and objective.optimizers.consecutive_skips == 0


@pytest.mark.parametrize("others", CASES.values(), ids=CASES)
@pytest.mark.parametrize("netG", ["resnet_1blocks", f"unet_{SIZE}"])
@pytest.mark.core(4)
def test_static_inputs_change_no_bit(others, netG):
    others = others | {"netG": netG}
    objective = make_static(others)
    assert_same_bits(objective, others)


# the gradient of a ResNet's reflection padding depends on the order of atomic additions
DETERMINISTIC = {"netG": f"unet_{SIZE}"}


@pytest.mark.gpu
@pytest.mark.parametrize("others", CASES.values(), ids=CASES)
def test_a_cuda_graph_changes_no_bit(others, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    others = others | DETERMINISTIC
    objective = make_static(others, "cuda")
    assert_same_bits(objective, others)
    assert objective.run_step._graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "blocked", "closed_form", "triton", "native"])
def test_cuda_graphs_of_the_relation_losses(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    others = {"backend": backend} | DETERMINISTIC
    objective = make_static(others, "cuda")
    assert_same_bits(objective, others)


@pytest.mark.gpu
def test_a_cuda_graph_of_a_resnet(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    objective = make_static({}, "cuda")
    expected, found = train(make({}, "cuda"))[0], train(objective)[0]
    for name, loss in expected[5].items():  # the second replay
        assert found[5][name] == pytest.approx(loss, rel=0.05), name


@pytest.mark.gpu
def test_a_cuda_graph_of_compiled_networks():
    objective = make_static({"compile": True}, "cuda")
    losses, _ = train(objective)
    assert all(math.isfinite(loss) for loss in losses[-1].values())
    assert objective.optimizers.skipped == 2


@pytest.mark.gpu
def test_a_source_is_found_after_replays():
    objective = make_static({}, "cuda")
    train(objective)
    batch = {side: images.clone() for side, images in batches(objective)[0].items()}
    batch["A"][0] = math.nan
    for _ in range(3):
        objective.step(batch)
    objective.find_nonfinite()
    assert objective.optimizers.consecutive_skips == 3 and objective.optimizers.skipped == 5
    assert objective.optimizers.nonfinite_loss and objective.nonfinite_source.startswith("the images of A")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stage_that_is_resumed_with_a_cuda_graph(run_dir, device, monkeypatch, capsys):
    """It ends with the weights of one without, and without an interruption."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = SMALL | {"model": "cycle_gan", "ngf": 4, "ndf": 4, "pool_size": 3, "ema": 0.7, "device": device}
    options |= DETERMINISTIC | {"synthetic_pairs": 8, "epoch_steps": 7, "n_epochs": 1, "n_epochs_decay": 1}
    config = TrainConfig(**options, save_latest_freq=5).resolved()
    states: list[dict[str, Any]] = []

    def fit(config: TrainConfig, **others: Any) -> list[Tensor]:
        trained = loop.fit(loop.Stage("student", config, 0, run_dir.folder), run_dir, {}, **others)
        return [value for net in trained.generators.values() for value in net.state_dict().values()]

    expected = fit(config, save_state=lambda state: states.append(copy.deepcopy(state)))
    found = fit(replace(config, cuda_graph=True), state=states[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert states[0]["step"] == 5
    assert ("cuda_graph has no effect: the device is cpu" in capsys.readouterr().out) == (device == "cpu")


class HostReads(TorchDispatchMode):
    """Counts operators that wait for the device when the tensors are on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("others", CASES.values(), ids=CASES)
def test_the_host_reads_nothing_within_a_step(others, monkeypatch):
    """The learning rate is read by the fused optimizers of the CPU, and by none of a GPU."""
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
    objective = make(others)
    batch = batches(objective)[0]
    objective.step(batch)
    with HostReads() as reads:
        objective.step(batch)
    assert reads.names == []


def test_images_of_another_size_run_without_the_graph(capsys):
    seen: list[dict[str, Tensor]] = []
    step = StaticStep(lambda inputs: seen.append(dict(inputs)) or {"loss": inputs["A"].sum()}, torch.device("cpu"))
    small, large = torch.ones(1, 3, 2, 2), torch.ones(1, 3, 4, 4)
    assert [float(step({"A": images})["loss"]) for images in (small, large, 2 * small, large)] == [12, 48, 24, 48]
    assert seen[1]["A"] is large and seen[0]["A"] is seen[2]["A"] is not small
    assert capsys.readouterr().out.count("another size") == 1


def test_a_short_first_batch_does_not_decide_the_shape_of_the_graph(capsys):
    """A run may be resumed at the last batch of an epoch, which has fewer images."""
    seen: list[Tensor] = []
    step = StaticStep(lambda inputs: seen.append(inputs["A"]) or {"loss": inputs["A"].sum()}, torch.device("cpu"))
    short, full = torch.ones(1, 3, 2, 2), torch.ones(4, 3, 2, 2)
    assert [float(step({"A": images})["loss"]) for images in (short, full, 2 * full, short)] == [12, 48, 96, 12]
    assert seen[1] is seen[2] is not full and seen[3] is short
    assert step._steps == 2, "steps of the warm-up have the shape of the capture"
    assert capsys.readouterr().out.count("another size") == 1


def test_replays_after_a_step_without_the_graph(monkeypatch):
    """What is not finite is looked for in the tensors of the graph, not in those of the step without it."""
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    objective = make({"lambda_feature": 1.0})
    objective.run_step = StaticStep(objective.take_step, torch.device("cuda"), objective.references)
    batch = batches(objective)[0]

    def tensors() -> list[Tensor]:
        [pair] = objective.student_teachers.values()
        found = [objective._inputs, objective._outputs, *objective.optimizers.losses.values(), pair.last_pass]
        return [value for part in found for value in part.values()]

    for _ in range(5):  # three of the warm-up, and two replays
        objective.step(batch)
    assert torch.cuda.CUDAGraph().replay.call_count == 2
    expected = tensors()
    objective.step({side: images[:1] for side, images in batch.items()})
    assert not {*map(id, expected)} & {*map(id, tensors())}
    objective.step(batch)
    assert [*map(id, tensors())] == [*map(id, expected)]


def test_a_step_that_cannot_be_captured_is_an_error(monkeypatch):
    class Failing:
        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *others: object) -> None: ...

    step = StaticStep(lambda inputs: {}, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **others: Failing())
    with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph: .*\nResume the run without --cuda_gr"):
        step._capture()


def test_reasons_against_a_graph(monkeypatch):
    config = TrainConfig(**SMALL).resolved()
    assert uncapturable_reason(config) == "the device is cpu, not a GPU"
    monkeypatch.setattr(TrainConfig, "torch_device", torch.device("cuda"))
    assert uncapturable_reason(config) == ""
    config = TrainConfig(**SMALL | {"dataroot": "x", "preprocess": "none"}).resolved()
    assert uncapturable_reason(config) == "--preprocess none gives images of different sizes"
    monkeypatch.setattr("srpkd.training.distributed.world_size", lambda: 2)
    assert uncapturable_reason(config) == "the run has several processes"
