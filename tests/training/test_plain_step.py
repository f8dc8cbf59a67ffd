"""The trainer's steps against plain ones, which are written in the order of the public trainer."""

import copy

import pytest
import torch
from small import SIZE, SMALL

from bench.plain_step import plain_step
from srpkd.training.loop import make_objective
from srpkd.training.options import TrainConfig

STEPS = 5


@pytest.fixture
def float64():
    """Networks and images of float64, whose rounding errors Adam does not scale up to steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"sizes": "differ"},
        {"norm": "batch"},
        {"lambda_identity": 0},
        {"gan_mode": "vanilla"},
        {"batch_size": 1},
        {"netD": "pixel"},
    ],
    ids=str,
)
def test_steps_are_those_of_the_public_trainer(model, others):
    others = dict(others)
    sizes = dict.fromkeys("AB", (SIZE, SIZE))
    if others.pop("sizes", "") and model == "cycle_gan":
        sizes["B"] = (SIZE, 2 * SIZE)
    # the learning rate is a power of two, because ours is a float32
    config = TrainConfig(**SMALL | {"model": model, "ngf": 4, "ndf": 4, "lr": 2**-7, "init_gain": 0.2} | others)
    objective = make_objective(config.resolved(), 0, {})
    generators, discriminators = copy.deepcopy((objective.generators, objective.discriminators))
    step = plain_step(objective.config, generators, discriminators)
    for _ in range(STEPS):
        batch = {side: torch.rand(config.batch_size, 3, *size) * 2 - 1 for side, size in sizes.items()}
        ours, theirs = objective.step(batch), {name: loss.detach() for name, loss in step(batch).items()}
        torch.testing.assert_close(ours, {name: theirs[name] for name in ours}, rtol=1e-6, atol=0)
        assert ours.keys() == theirs.keys()
    for name, network in objective.networks.items():
        plain = (generators | discriminators)[name]
        for key, value in network.state_dict().items():
            if value.ndim == 4:  # the gradient of a bias before a norm is rounding error
                torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-5, atol=1e-7)
