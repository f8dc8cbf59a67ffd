import copy
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small import SIZE, SMALL, images
from torch import Tensor, nn

from srpkd import SRPLoss
from srpkd.taps import FeatureTap
from srpkd.training import objectives
from srpkd.training.loop import make_objective
from srpkd.training.objectives import gan_loss, lr_factor
from srpkd.training.options import TrainConfig

MODELS = ("pix2pix", "cycle_gan")


def options(model: str, **others) -> TrainConfig:
    """Options of very small networks; every loss has a different weight."""
    config = TrainConfig(
        **SMALL,
        model=model,
        ngf=2,
        ndf=3,
        lambda_L1=7,
        lambda_A=3,
        lambda_B=5,
        lambda_identity=0.25,
        lambda_kd=11,
        lambda_srp=13,
        normalize="row",
        distance="l1",
        lambda_feature=17,
    )
    return replace(config, **others).resolved()


def make_small(config: TrainConfig, distilled: bool = False) -> objectives.Objective:
    if not distilled:
        return make_objective(config, 0, {})
    teachers = make_objective(replace(config, ngf=4), 1, {}).generators
    for teacher in teachers.values():
        teacher.eval().requires_grad_(False)
    return make_objective(config, 0, teachers)


def parameters(networks: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [parameter for network in networks.values() for parameter in network.parameters()]


def gradients(networks: dict[str, nn.Module]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in parameters(networks)]


def assert_gradients(networks: dict[str, nn.Module], expected: tuple[Tensor, ...]) -> None:
    found, wanted = (torch.cat([gradient.flatten() for gradient in group]) for group in (gradients(networks), expected))
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


# The learning rate


def test_lr_factor_is_constant_and_then_decays():
    assert [lr_factor(epoch, 2, 3) for epoch in range(1, 6)] == [1, 1, 0.75, 0.5, 0.25]
    assert [lr_factor(epoch, 0, 1) for epoch in (1, 2)] == [0.5, 0]
    assert lr_factor(100, 100, 100) == 1
    assert lr_factor(200, 100, 100) == pytest.approx(1 / 101)
    assert {lr_factor(epoch, 3, 0) for epoch in (1, 2, 3)} == {1}


# The optimizers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("distilled", [False, True])
def test_one_adam_for_generators_and_one_for_discriminators(model, distilled):
    objective = make_small(options(model, lr=0.003, beta1=0.4), distilled)
    adapters = {name: entry.adapters for name, entry in objective.student_teachers.items()}
    assert bool(parameters(adapters)) == distilled
    expected = {
        "G": parameters(objective.generators) + parameters(adapters),
        "D": parameters(objective.discriminators),
    }
    assert objective.optimizers.by_group.keys() == expected.keys()
    for name, optimizer in objective.optimizers.by_group.items():
        assert type(optimizer) is torch.optim.Adam
        [group] = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.003, (0.4, 0.999), 0)
        assert [id(p) for p in group["params"]] == [id(p) for p in expected[name]]


@pytest.mark.parametrize(("model", "order"), [("pix2pix", ["D", "G"]), ("cycle_gan", ["G", "D"])])
@pytest.mark.parametrize("distilled", [False, True])
def test_update_order_and_separate_gradients(model, order, distilled):
    objective = make_small(options(model), distilled)
    networks = {"G": objective.generators, "D": objective.discriminators}
    teachers = {name: entry.relations.teacher for name, entry in objective.student_teachers.items()}
    seen, updated = [], []

    def watch(name: str) -> None:
        step, other = objective.optimizers.by_group[name].step, "D" if name == "G" else "G"

        def watched() -> None:
            seen.append({owner: gradients(found) for owner, found in networks.items()})
            before = copy.deepcopy(networks[other])
            step()
            updated.append(name)
            assert all(torch.equal(a, b) for a, b in zip(parameters(before), parameters(networks[other])))

        objective.optimizers.by_group[name].step = watched

    watch("G")
    watch("D")
    objective.step(images())
    assert updated == order
    first, second = order
    assert all(gradient is not None for gradient in seen[0][first])
    assert all(gradient is None for gradient in seen[0][second])
    # the second backward pass did not change the gradients of the first networks
    assert all(torch.equal(a, b) for a, b in zip(seen[0][first], seen[1][first]))
    assert all(gradient is not None for gradient in seen[1][second])
    assert all(p.grad is None for p in parameters(teachers))


@pytest.mark.parametrize("model", MODELS)
def test_a_step_changes_every_network_and_adapter(model):
    objective = make_small(options(model), distilled=True)
    adapters = {name: entry.adapters for name, entry in objective.student_teachers.items()}
    networks = [objective.generators, objective.discriminators, adapters]
    before = [[p.detach().clone() for p in parameters(group)] for group in networks]
    teachers = [copy.deepcopy(entry.relations.teacher.state_dict()) for entry in objective.student_teachers.values()]
    objective.step(images())
    for old, group in zip(before, networks):
        # only weights: a bias before an instance norm has no effect, so its gradient is rounding error
        assert all(not torch.equal(a, b) for a, b in zip(old, parameters(group)) if a.ndim == 4)
    for old, entry in zip(teachers, objective.student_teachers.values()):
        assert all(torch.equal(value, entry.relations.teacher.state_dict()[key]) for key, value in old.items())


@pytest.mark.parametrize("model", MODELS)
def test_the_initial_weights_follow_the_options(model):
    objective = make_small(options(model, init_type="orthogonal", init_gain=0.5))
    weights = [p for p in parameters(objective.generators) + parameters(objective.discriminators) if p.ndim == 4]
    for weight in weights:
        values = torch.linalg.svdvals(weight.flatten(1))
        torch.testing.assert_close(values, torch.full_like(values, 0.5))


# The losses, computed again from their definitions


def mean_bce(logits: Tensor, real: bool) -> Tensor:
    return (F.softplus(-logits) if real else F.softplus(logits)).mean()


def mean_square(logits: Tensor, real: bool) -> Tensor:
    return ((logits - float(real)) ** 2).mean()


def distilled_losses(student: nn.Module, teacher: nn.Module, adapter: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The three distillation losses, from separate forward passes."""
    ours, theirs = (FeatureTap(network, ["model.9"]) for network in (student, teacher))
    with ours.recording() as student_features:
        output = student(x)
    with theirs.recording() as teacher_features, torch.no_grad():
        target = teacher(x)
    ours.close()
    theirs.close()
    a, b = student_features["model.9"], teacher_features["model.9"]
    return {
        "kd": 11 * (output - target).abs().mean(),
        "srp": 13 * SRPLoss("row", "l1")(a, b),
        "feature": 17 * ((adapter(a) - b) ** 2).mean(),
    }


@pytest.mark.parametrize(("gan_mode", "gan"), [("vanilla", mean_bce), ("lsgan", mean_square)])
@pytest.mark.parametrize("distilled", [False, True])
def test_pix2pix_losses(gan_mode, gan, distilled):
    objective = make_small(options("pix2pix", gan_mode=gan_mode), distilled)
    G, D = (copy.deepcopy(net) for net in (objective.generators["G"], objective.discriminators["D"]))
    adapters = [copy.deepcopy(entry.adapters[0]) for entry in objective.student_teachers.values()]
    batch = images()
    a, b = batch["A"], batch["B"]
    losses = objective.step(batch)

    fake = G(a)
    expected = {
        "D_fake": gan(D(torch.cat([a, fake.detach()], 1)), False),
        "D_real": gan(D(torch.cat([a, b], 1)), True),
    }
    half = (expected["D_fake"] + expected["D_real"]) / 2
    assert_gradients(objective.discriminators, torch.autograd.grad(half, D.parameters()))

    D = objective.discriminators["D"]  # G sees the updated discriminator
    expected_G = {"G_GAN": gan(D(torch.cat([a, fake], 1)), True), "G_L1": 7 * (fake - b).abs().mean()}
    if distilled:
        expected_G |= distilled_losses(G, objective.student_teachers["G"].relations.teacher, adapters[0], a)
    assert_gradients(objective.generators, torch.autograd.grad(sum(expected_G.values()), G.parameters()))
    expected |= expected_G
    assert losses.keys() == expected.keys()
    assert all(not loss.requires_grad and loss.ndim == 0 for loss in losses.values())
    torch.testing.assert_close(losses, {name: loss.detach() for name, loss in expected.items()})


@pytest.mark.parametrize(("gan_mode", "gan"), [("vanilla", mean_bce), ("lsgan", mean_square)])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("identity", [0.25, 0])
def test_cycle_gan_losses(gan_mode, gan, distilled, identity):
    objective = make_small(options("cycle_gan", gan_mode=gan_mode, lambda_identity=identity), distilled)
    generators, discriminators = copy.deepcopy(objective.generators), copy.deepcopy(objective.discriminators)
    adapters = {name: copy.deepcopy(entry.adapters[0]) for name, entry in objective.student_teachers.items()}
    (G_A, G_B), (D_A, D_B) = generators.values(), discriminators.values()
    batch = images()
    a, b = batch["A"], batch["B"]
    losses = objective.step(batch)

    fake_b, fake_a = G_A(a), G_B(b)
    expected_G = {
        "G_A": gan(D_A(fake_b), True),
        "G_B": gan(D_B(fake_a), True),
        "cycle_A": 3 * (G_B(fake_b) - a).abs().mean(),
        "cycle_B": 5 * (G_A(fake_a) - b).abs().mean(),
    }
    if identity:
        expected_G["idt_A"] = 5 * 0.25 * (G_A(b) - b).abs().mean()
        expected_G["idt_B"] = 3 * 0.25 * (G_B(a) - a).abs().mean()
    for direction, adapter in adapters.items():
        student, teacher = generators[direction], objective.student_teachers[direction].relations.teacher
        terms = distilled_losses(student, teacher, adapter, a if direction == "G_A" else b)
        expected_G |= {f"{name}_{direction[-1]}": term for name, term in terms.items()}
    assert_gradients(
        objective.generators, torch.autograd.grad(sum(expected_G.values()), parameters(generators), retain_graph=True)
    )
    # the pools are empty at first, so both discriminators see the new images
    expected_D = {
        "D_A": (gan(D_A(b), True) + gan(D_A(fake_b.detach()), False)) / 2,
        "D_B": (gan(D_B(a), True) + gan(D_B(fake_a.detach()), False)) / 2,
    }
    assert_gradients(
        objective.discriminators, torch.autograd.grad(sum(expected_D.values()), parameters(discriminators))
    )
    expected = expected_G | expected_D
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses, {name: loss.detach() for name, loss in expected.items()})


def test_cycle_gan_discriminators_query_the_pools():
    objective = make_small(options("cycle_gan"))
    queried = {}
    for name, pool in objective.pools.items():
        pool.query = lambda fake, *others, name=name: queried.setdefault(name, torch.zeros_like(fake)).detach()
    D_A = copy.deepcopy(objective.discriminators["D_A"])
    batch = images()
    losses = objective.step(batch)
    assert queried.keys() == {"D_A", "D_B"}
    expected = (mean_square(D_A(batch["B"]), True) + mean_square(D_A(torch.zeros(2, 3, SIZE, SIZE)), False)) / 2
    torch.testing.assert_close(losses["D_A"], expected.detach())


def test_without_pools_the_discriminators_see_the_new_images():
    objective = make_small(options("cycle_gan", pool_size=0))
    for _ in range(2):
        batch, before = images(), copy.deepcopy((objective.generators["G_A"], objective.discriminators["D_A"]))
        losses = objective.step(batch)
    G_A, D_A = before
    expected = (mean_square(D_A(batch["B"]), True) + mean_square(D_A(G_A(batch["A"])), False)) / 2
    torch.testing.assert_close(losses["D_A"], expected.detach())
    assert objective.rank_state_dict() == {"pools": {}}


@pytest.mark.parametrize("model", MODELS)
def test_states_are_restored(model):
    """A restored objective takes the same step: networks, adapters, averages, optimizers and image pools."""
    config = options(model, pool_size=3, ema=0.9)
    first, second = (make_small(config, distilled=True) for _ in range(2))
    for value in (math.nan, 0, 0):  # the first step is skipped, and counted
        batch = images()
        batch["A"][0] += value
        first.step(batch)
    assert first.optimizers.skipped == 1
    assert {len(pool.images) for pool in first.pools.values()} == ({3} if model == "cycle_gan" else set())
    state, rank_state = copy.deepcopy((first.state_dict(), first.rank_state_dict()))
    second.load_state_dict(state)
    second.load_rank_state_dict(rank_state)
    batch, losses = images(), []
    for objective in (first, second):
        random.seed(1)  # of the pools
        losses.append(objective.step(batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(first.rank_state_dict(), second.rank_state_dict(), rtol=0, atol=0)


def test_identity_loss_needs_equal_channels():
    uneven = {"dataroot": "x", "input_nc": 1, "output_nc": 3}
    with pytest.raises(ValueError, match=r"lambda_identity=0\.25 needs images of equal channels .* set lambda_ident"):
        make_small(options("cycle_gan", **uneven))
    objective = make_small(options("cycle_gan", lambda_identity=0, **uneven), distilled=True)
    objective.step({"A": torch.zeros(1, 1, SIZE, SIZE), "B": torch.zeros(1, 3, SIZE, SIZE)})
    make_small(options("pix2pix", **uneven)).step(
        {"A": torch.zeros(1, 1, SIZE, SIZE), "B": torch.zeros(1, 3, SIZE, SIZE)}
    )


# GAN loss


@pytest.mark.parametrize(
    ("mode", "real", "fake"),
    [
        ("lsgan", (0 + 1 + 9) / 3, (1 + 0 + 4) / 3),
        ("vanilla", (0.313262 + 0.693147 + 2.126928) / 3, (1.313262 + 0.693147 + 0.126928) / 3),  # log(1 + exp(-+x))
    ],
)
def test_gan_loss_of_known_logits(mode, real, fake):
    logits = torch.tensor([1.0, 0.0, -2.0]).view(1, 1, 1, 3)
    assert gan_loss(logits, True, mode).item() == pytest.approx(real, rel=1e-5)
    assert gan_loss(logits, False, mode).item() == pytest.approx(fake, rel=1e-5)
