import copy
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SIZE, SMALL, images
from torch import Tensor, nn

from srpkd.models.checkpoints import load_weights
from srpkd.models.networks import define_generator
from srpkd.training import loop
from srpkd.training.loop import MAX_CONSECUTIVE_SKIPS, Diverged, Stage, freeze_for_inference
from srpkd.training.optimizers import GuardedOptimizers
from srpkd.training.options import TrainConfig
from srpkd.training.run_dir import RunDir, new_folder

BAD = (math.nan, math.inf, -math.inf)


def options(model: str = "pix2pix", **others: Any) -> TrainConfig:
    config = TrainConfig(
        **SMALL,
        model=model,
        ngf=2,
        ndf=2,
        synthetic_pairs=8,
        n_epochs=1,
        n_epochs_decay=0,
        epoch_steps=6,
        print_freq=1,
        lr=0.01,
    )
    return replace(config, **others).resolved()


def weights(objective: Any) -> dict[str, Tensor]:
    networks = objective.generators | objective.discriminators
    return {f"{name}.{key}": value.clone() for name, net in networks.items() for key, value in net.state_dict().items()}


def changed(before: dict[str, Tensor], objective: Any) -> set[str]:
    """Names of the networks whose weights changed."""
    after = weights(objective)
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


@pytest.fixture
def trained(tmp_path) -> Callable[..., tuple[Any, list[dict[str, Any]], Path]]:
    """A function that trains a stage and returns its result, its lines of metrics and its folder."""

    def train(config: TrainConfig, teachers: Any = (), **others: Any) -> tuple[Any, list[dict[str, Any]], Path]:
        run_dir = RunDir(new_folder(str(tmp_path), "run"))
        try:
            result = loop.fit(Stage("student", config, 0, run_dir.folder), run_dir, dict(teachers), **others)
        finally:
            run_dir.close()
        lines = [json.loads(line) for line in (run_dir.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        return result, lines, run_dir.folder

    return train


# Clipping


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_per_group(precision):
    config = options(clip_grad_norm=1e-3, precision=precision)
    objective = loop.make_objective(config, 0, {})
    norms = {}
    for name, optimizer in objective.optimizers.by_group.items():
        step, parameters = optimizer.step, [p for group in optimizer.param_groups for p in group["params"]]

        def measured(step=step, name=name, parameters=parameters, optimizer=optimizer) -> None:
            scale = getattr(optimizer, "grad_scale", None)  # by which the optimizer still divides the gradients
            norms[name] = torch.stack([p.grad.norm() for p in parameters]).norm().item() / float(scale or 1)
            step()

        optimizer.step = measured
    for _ in range(12):  # the loss scale of float16 adapts first
        objective.step(images())
    assert norms == {"G": pytest.approx(1e-3, rel=1e-3), "D": pytest.approx(1e-3, rel=1e-3)}


# Non-finite losses


def spoil(objective: Any, network: str, value: float) -> None:
    """Put a non-finite value into a network's next output."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        return output.index_fill(0, torch.tensor([1]), value)

    handle = objective.networks[network].register_forward_hook(hook)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("model", "network", "nonfinite_loss"),
    [
        ("pix2pix", "G", "D_fake"),
        ("pix2pix", "D", "D_fake"),
        ("cycle_gan", "G_A", "G_A"),
        ("cycle_gan", "G_B", "G_B"),
        ("cycle_gan", "D_B", "G_B"),
    ],
)
def test_step_with_a_non_finite_loss_is_skipped(model, network, nonfinite_loss, value):
    objective = loop.make_objective(options(model), 0, {})
    optimizers = objective.optimizers
    objective.step(images())
    before = weights(objective)
    pools = {name: len(pool.images) for name, pool in objective.pools.items()}
    spoil(objective, network, value)
    losses = objective.step(images())
    objective.find_nonfinite()
    assert not losses[nonfinite_loss].isfinite()
    assert not changed(before, objective)
    assert (optimizers.nonfinite_loss, optimizers.skipped, optimizers.consecutive_skips) == (nonfinite_loss, 1, 1)
    assert {name: len(pool.images) for name, pool in objective.pools.items()} == pools
    assert all(loss.isfinite() for loss in objective.step(images()).values())
    objective.find_nonfinite()
    assert changed(before, objective) == objective.networks.keys()
    assert (optimizers.nonfinite_loss, optimizers.skipped, optimizers.consecutive_skips) == ("", 1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_step_with_a_non_finite_loss_is_skipped_on_a_gpu(model, precision):
    objective = loop.make_objective(options(model, device="cuda", precision=precision, clip_grad_norm=1), 0, {})
    batch = {side: image.cuda() for side, image in images().items()}
    objective.step(batch)
    before = weights(objective)
    spoiled = {side: image.clone() for side, image in batch.items()}
    spoiled["A"][:] = math.nan
    objective.step(spoiled)
    assert not changed(before, objective) and objective.optimizers.skipped == 1
    for _ in range(12):
        losses = objective.step(batch)
    assert all(loss.isfinite() for loss in losses.values())
    assert changed(before, objective) == objective.networks.keys()


def test_only_the_second_update_is_skipped():
    objective = loop.make_objective(options(), 0, {})
    before = weights(objective)
    batch = images()
    objective.config.lambda_L1 = math.inf
    objective.step(batch)
    objective.find_nonfinite()
    assert changed(before, objective) == {"D"}
    assert objective.optimizers.nonfinite_loss == "G_L1"


def test_overflow_of_the_sum_is_skipped():
    net = nn.Linear(1, 1)
    optimizers = GuardedOptimizers(options(), {"G": [net]})
    before = net.weight.clone()
    x = net(torch.ones(1, 1)).sum() + 3e38
    optimizers.begin()
    optimizers.step("G", {"a": x, "b": x})
    optimizers.finish()
    optimizers.find_nonfinite_loss()
    assert optimizers.nonfinite_loss == "the sum of a, b"
    assert torch.equal(net.weight, before)


def test_optimizers_that_are_not_fused_skip_on_the_host():
    """As on devices without fused optimizers."""
    objective = loop.make_objective(options(precision="fp16"), 0, {})
    objective.optimizers._is_fused = False
    for optimizer in objective.optimizers.by_group.values():
        optimizer.param_groups[0]["fused"] = None
        optimizer._step_supports_amp_scaling = False
    for _ in range(12):  # the loss scale of float16 adapts first
        objective.step(images())
    before, batch = weights(objective), images()
    batch["A"][:] = math.nan
    objective.step(batch)
    assert not changed(before, objective) and objective.optimizers.skipped == 1
    objective.step(images())
    assert changed(before, objective) == objective.networks.keys()


def test_the_loss_scale_does_not_change_if_the_loss_itself_is_not_finite():
    objective = loop.make_objective(options(precision="fp16"), 0, {})
    for _ in range(12):  # the loss scale adapts first
        objective.step(images())
    scale, batch = objective.optimizers.scaler.get_scale(), images()
    batch["A"][:] = math.nan
    objective.step(batch)
    assert objective.optimizers.skipped == 1
    assert objective.optimizers.scaler.get_scale() == scale


def test_batch_norms_reset_non_finite_statistics():
    objective = loop.make_objective(options(norm="batch"), 0, {})
    objective.step(images())
    batch = images()
    batch["A"][0, 0, 0, 0] = math.nan
    objective.step(batch)
    assert objective.optimizers.skipped == 1
    assert all(value.isfinite().all() for value in weights(objective).values())
    for module in objective.generators["G"].modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()
    objective.generators["G"].eval()
    assert objective.generators["G"](images()["A"]).isfinite().all()


def test_diverged_run_stops_at_its_last_finite_state(trained, monkeypatch):
    make, states = loop.make_objective, []

    def diverging(*arguments: Any) -> Any:
        objective = make(*arguments)
        step, number = objective.step, 0

        def stepped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal number
            number += 1
            if number == 2 or number > 4:  # training continues after the first
                batch["B"][0] = math.nan
            return step(batch)

        objective.step = stepped
        return objective

    monkeypatch.setattr(loop, "make_objective", diverging)
    config = options(save_latest_freq=1, epoch_steps=50)
    message = (
        rf"student: {MAX_CONSECUTIVE_SKIPS} consecutive steps were skipped: the loss D_real was not finite, first at "
        r"step 5; not finite before it: the images of B \(.* are nan\)\. Start a new run with images that are finite$"
    )
    with pytest.raises(Diverged, match=message):
        trained(config, save_state=states.append)
    assert [state["step"] for state in states] == [1, 3, 4]


STUDENT_ADVICE = r"contains the last finite state: start a new run with a lower --lr .*--resume \S+run$"


def diverge(trained, config, teachers=None, **others):
    """Train until the guard stops the run; return its message. Warnings are errors."""
    with warnings.catch_warnings(), pytest.raises(Diverged) as caught:
        warnings.simplefilter("error")
        trained(config, teachers or {}, **others)
    return str(caught.value)


def pair(model="pix2pix", **others):
    """Options of a student that learns from a teacher, and the teacher, of one generator."""
    direction = {"pix2pix": "G", "cycle_gan": "G_A"}[model]
    teacher = define_generator("resnet_1blocks", ngf=2, norm="batch", init_gain=0.2).eval().requires_grad_(False)
    return options(model, teacher="given", epoch_steps=2, n_epochs=20, **others), {direction: teacher}


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_a_teacher_whose_output_is_not_finite_is_named(trained, model):
    config, teachers = pair(model)
    (direction,) = teachers
    teachers[direction].model[-2].bias.fill_(math.nan)
    message = diverge(trained, config, teachers)
    loss = {"pix2pix": "kd", "cycle_gan": "kd_A"}[model]
    assert f"the loss {loss} was not finite, first at step 1; not finite before it: the teacher's output (" in message
    assert message.endswith(f"of {direction}. Start a new run with another teacher") and "--lr" not in message


def test_a_teacher_whose_feature_is_not_finite_is_named(trained):
    config, teachers = pair()
    teachers["G"].model[4].weight.fill_(3e38)
    message = diverge(trained, config, teachers)
    assert re.search(r"before it: the teacher's feature model\.\d+ \(.* of G\. Start .* another teacher$", message)


def test_a_feature_of_the_student_that_is_not_finite_is_named(trained, monkeypatch):
    make = loop.make_objective

    def spoiled(*arguments):
        objective = make(*arguments)
        with torch.no_grad():
            objective.generators["G"].model[4].weight.fill_(3e38)
        return objective

    monkeypatch.setattr(loop, "make_objective", spoiled)
    config, teachers = pair()
    message = diverge(trained, config, teachers)
    assert re.search(rf"before it: the student's feature model\.\d+ \(.* of G\. \S+ {STUDENT_ADVICE}", message)


def test_only_the_loss_is_named_if_everything_else_is_finite(trained):
    config, teachers = pair(lambda_srp=1e38, lambda_kd=0)
    message = diverge(trained, replace(config, lambda_srp=math.inf), teachers)
    assert re.search(rf"the loss srp was not finite, first at step 1\. \S+ {STUDENT_ADVICE}", message)


def test_weights_that_a_gradient_made_non_finite(trained, monkeypatch, tmp_path):
    """The weights that were saved before are kept."""
    make, steps = loop.make_objective, []

    def spoiled(*arguments):
        objective = make(*arguments)
        step = objective.step

        def stepped(batch):
            losses = step(batch)
            steps.append(losses)
            if len(steps) == 3:
                with torch.no_grad():
                    objective.generators["G"].model[1].weight.view(-1)[0] = math.nan
            return losses

        objective.step = stepped
        return objective

    monkeypatch.setattr(loop, "make_objective", spoiled)
    message = diverge(trained, options(epoch_steps=2, n_epochs=20, save_epoch_freq=1))
    assert re.search(r"not finite before it: the weights model\.1\.weight of G \(1 of 294 values are nan\)\.", message)
    steps.clear()
    message = diverge(trained, options(epoch_steps=1, n_epochs=3, save_epoch_freq=1))
    assert re.match(r"student: after step 3, the weights model\.1\.weight of G \(.*\) are not finite; ", message)
    for folder in tmp_path.iterdir():
        assert (folder / "1_net_G.pth").exists() or (folder / "2_net_G.pth").exists()
        load_weights(folder / "latest_net_G.pth")


def test_skipped_steps_are_logged(trained, monkeypatch):
    step = loop.OBJECTIVES["pix2pix"].step
    calls = []

    def stepped(self: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) in (2, 4):
            batch["A"][:] = math.inf
        return step(self, batch)

    monkeypatch.setattr(loop.OBJECTIVES["pix2pix"], "step", stepped)
    _, lines, _ = trained(options())
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 2, 2, 2]


# Moving averages of the weights


def test_a_stage_returns_the_average(trained):
    decay = 0.7
    history: list[dict[str, Tensor]] = []

    def save_state(state: dict[str, Any]) -> None:
        history.append({key: value.clone() for key, value in state["objective"]["networks"]["G"].items()})

    config = options(ema=decay, save_latest_freq=1, norm="batch")
    result, _, folder = trained(config, save_state=save_state)
    expected = history[0]
    for later in history[1:]:
        expected = {
            key: decay * value + (1 - decay) * later[key] if value.is_floating_point() else later[key]
            for key, value in expected.items()
        }
    saved, latest = load_weights(folder / "latest_net_G.pth"), history[-1]
    found = result.generators["G"].state_dict()
    for key in expected:
        if expected[key].is_floating_point():
            torch.testing.assert_close(saved[key], expected[key])
            assert torch.equal(saved[key], found[key])
    assert any(not torch.equal(saved[key], latest[key]) for key in latest)
    assert not any(module.training or module._forward_hooks for module in result.generators["G"].modules())


def test_averages_do_not_change_training(trained):
    lines = [trained(options(ema=ema))[1] for ema in (None, 0.5)]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


# Generators for inference


@pytest.mark.parametrize("train_mode_norm", [False, True])
def test_frozen_generator_is_deterministic_and_does_not_change(train_mode_norm):
    net = define_generator("resnet_1blocks", ngf=2, norm="batch", dropout=True)
    x = torch.rand(2, 3, SIZE, SIZE)
    net(x)
    running = copy.deepcopy(net).eval()(x)
    used = freeze_for_inference(net, options(norm="batch", train_mode_norm=train_mode_norm))
    before = copy.deepcopy(used.state_dict())
    assert torch.equal(used(x), used(x))
    assert all(torch.equal(value, used.state_dict()[key]) for key, value in before.items())
    torch.testing.assert_close(used(x)[:1], used(x[:1]), rtol=0, atol=1e-5)  # independent of the rest of the batch
    assert torch.allclose(used(x), running, atol=1e-4) != train_mode_norm
    assert not any(p.requires_grad for p in used.parameters())
