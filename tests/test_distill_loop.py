"""``srpkd.distill`` with networks that the trainer does not know."""

from __future__ import annotations

import copy
import statistics
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from srpkd import SRPLoss, distill
from srpkd.defaults import KD_WEIGHT, SRP_WEIGHT


class Generator(nn.Module):
    """An encoder, separable convolutions, an upsampling: not an architecture of define_generator."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(1, width), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Conv2d(width, width, 1))
        self.head = nn.Sequential(nn.Upsample(scale_factor=2), nn.Dropout(0.5), nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head(x + self.middle(x))


@pytest.fixture
def networks() -> tuple[Generator, Generator]:
    return Generator(12), Generator(5)


IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LAYERS = {"encoder": "encoder"}


def test_losses_decrease_and_the_teacher_is_unchanged(networks):
    teacher, student = networks
    teacher.head[1].eval()
    modes = [module.training for module in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())
    steps = []
    history = distill(
        teacher,
        student,
        IMAGES.split(3),
        LAYERS,
        epochs=30,
        lr=5e-3,
        progress=False,
        on_step=lambda *a: steps.append(a),
    )
    assert len(history) == 30 and history[0].keys() == {"kd", "srp"}
    assert all(history[-1][name] < 0.8 * history[0][name] for name in ("kd", "srp"))
    assert [step for step, _ in steps] == list(range(1, 61))
    for epoch in (0, 29):
        assert history[epoch]["kd"] == pytest.approx((steps[2 * epoch][1]["kd"] + steps[2 * epoch + 1][1]["kd"]) / 2)
    assert not any(module.training for module in student.modules())
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for net in networks for module in net.modules())
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_frozen_modules_in_eval_mode_keep_their_statistics(networks):
    """Others are trained in train mode, as those of a pretrained network that was loaded in eval mode."""
    teacher, student = networks
    frozen = nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5, affine=False)).requires_grad_(False)
    trained = nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5))
    student.encoder[1], student.middle[1] = frozen, trained
    student.eval()
    trained[1].train().requires_grad_(False)
    modes = []
    student.head[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    distill(teacher, student, [IMAGES], LAYERS, progress=False)
    assert all(not norm.running_mean.any() and norm.num_batches_tracked == 0 for norm in frozen)
    assert all(norm.num_batches_tracked == 1 for norm in trained) and modes == [True]
    assert not any(module.training for module in student.modules())


def test_steps_minimise_the_weighted_sum(networks):
    teacher, student = networks
    student.head[1] = nn.Identity()  # with dropout two passes would differ
    expected = copy.deepcopy(student)
    targets = IMAGES.flip(0)
    options = {"lambda_kd": 3.0, "lambda_srp": 7.0, "lambda_target": 2.0, "weights": {"encoder": 0.5}, "epochs": 2}
    loss = SRPLoss("cosine", "huber")
    history = distill(teacher, student, [(IMAGES, targets)], LAYERS, loss=loss, progress=False, lr=1e-2, **options)

    with torch.no_grad():
        teacher.eval()
        teacher_feature, teacher_output = teacher.encoder(IMAGES), teacher(IMAGES)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-2, betas=(0.5, 0.999))
    assert len(history) == 2
    for means in history:
        feature, output = expected.encoder(IMAGES), expected(IMAGES)
        kd, target = 3 * (output - teacher_output).abs().mean(), 2 * (output - targets).abs().mean()
        srp = 7 * 0.5 * loss(feature, teacher_feature)
        assert means == pytest.approx({"kd": kd.item(), "srp": srp.item(), "target": target.item()}, rel=1e-5)
        optimizer.zero_grad()
        (kd + srp + target).backward()
        optimizer.step()
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_target", [(True, False, False), (False, True, True), (False, False, True)])
def test_batches_without_a_target(networks, with_target):
    """``target`` may return None: the mean of that loss is over the other batches."""
    batches, steps = [(IMAGES[:3], has) for has in with_target], []
    (means,) = distill(
        *networks,
        batches,
        LAYERS,
        forward=lambda network, batch: network(batch[0]),
        target=lambda batch: batch[0] if batch[1] else None,
        on_step=lambda _, values: steps.append(values),
        progress=False,
    )
    assert [("target" in values) for values in steps] == list(with_target)
    for name in ("kd", "srp", "target"):
        assert means[name] == pytest.approx(statistics.fmean(values[name] for values in steps if name in values))


def test_data_loader_optimizer_and_progress_bar(networks, capsys):
    teacher, student = networks
    loader = DataLoader(TensorDataset(IMAGES), batch_size=4)  # yields lists of one tensor
    frozen = student.head[2].weight.clone()
    optimizer = torch.optim.SGD(student.encoder.parameters(), lr=0.1)
    (means,) = distill(teacher, student, loader, LAYERS, lambda_srp=0, optimizer=optimizer)
    assert means.keys() == {"kd"}
    assert torch.equal(student.head[2].weight, frozen)
    assert "epoch 1/1" in capsys.readouterr().err


class CountedLoss(nn.Module):
    """SRPLoss, and how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.calls = SRPLoss(), 0

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.calls += 1
        return self.loss(student, teacher)


@pytest.mark.parametrize(("lambda_srp", "calls"), [(0, 0), (0.5, 3)])
def test_no_relation_loss_is_computed_at_weight_0(networks, lambda_srp, calls):
    loss = CountedLoss()
    history = distill(*networks, IMAGES.split(2), LAYERS, lambda_srp=lambda_srp, loss=loss, progress=False)
    assert loss.calls == calls
    assert history[0].keys() == ({"kd", "srp"} if lambda_srp else {"kd"})


@pytest.mark.parametrize(("weight", "terms"), [("lambda_kd", {"srp", "target"}), ("lambda_target", {"kd", "srp"})])
def test_other_terms_at_weight_0_are_not_computed(networks, weight, terms):
    (means,) = distill(*networks, [(IMAGES, IMAGES)], LAYERS, progress=False, **{weight: 0})
    assert means.keys() == terms


def test_features_are_not_tapped_at_weight_0(networks):
    """A layer that no forward pass uses raises only if its features are needed."""
    for network in networks:
        network.unused = nn.Conv2d(3, 3, 1)
    layers = {"unused": "unused"}
    distill(*networks, [IMAGES], layers, lambda_srp=0, progress=False)
    with pytest.raises(RuntimeError, match=r"teacher layers \['unused'\] did not run"):
        distill(*networks, [IMAGES], layers, progress=False)


def test_default_loss_and_weights(networks):
    """The defaults are ``SRPLoss()`` and the weights of srpkd.defaults."""
    teacher, student = networks
    student.head[1] = nn.Identity()  # with dropout two runs would differ
    options = {"lambda_kd": KD_WEIGHT["distill"], "lambda_srp": SRP_WEIGHT["distill"], "loss": SRPLoss()}
    default, explicit = (
        distill(teacher, copy.deepcopy(student), [IMAGES], LAYERS, progress=False, **given) for given in ({}, options)
    )
    assert default == explicit


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([{"A": IMAGES}], TypeError, "the data gave a dict; expected image tensors .* pass forward="),
        ([(IMAGES, "path")], TypeError, "gave a tuple of Tensor, str; expected"),
        ([(IMAGES,) * 3], TypeError, "of Tensor, Tensor, Tensor; expected"),
        ([], ValueError, "gave no batch in epoch 1"),
        (
            [(IMAGES, IMAGES[..., :4])],
            ValueError,
            r"is \(6, 3, 8, 8\) and the target \(6, 3, 8, 4\): .* RelationDistiller",
        ),
    ],
)
def test_invalid_data(networks, data, error, message):
    with pytest.raises(error, match=message):
        distill(*networks, data, LAYERS, progress=False)


def test_data_that_can_be_iterated_only_once(networks):
    with pytest.raises(ValueError, match=r"no batch in epoch 2.*a generator can be iterated only once"):
        distill(*networks, iter([IMAGES]), LAYERS, epochs=2, progress=False)


def test_invalid_options(networks):
    with pytest.raises(ValueError, match="no module named 'encodr'; the nearest names are 'encoder'"):
        distill(*networks, [IMAGES], {"encodr": "encoder"}, progress=False)
    with pytest.raises(ValueError, match=r"every weight .* is 0"):
        distill(*networks, [IMAGES], LAYERS, lambda_kd=0, lambda_srp=0, progress=False)
    small = nn.Sequential(Generator(4), nn.AvgPool2d(2))
    with pytest.raises(ValueError, match=r"output is \(6, 3, 4, 4\) and the teacher's output \(6, 3, 8, 8\)"):
        distill(networks[0], small, [IMAGES], {"0.encoder": "encoder"}, progress=False)


def test_student_that_shares_parameters_with_the_teacher(networks):
    teacher, student = Generator(5), networks[1]
    student.middle = teacher.middle
    with pytest.raises(ValueError, match=r"the optimizer has 4 parameters, such as 'middle.0.weight': .*deepcopy"):
        distill(teacher, student, [IMAGES], LAYERS, progress=False)
    with pytest.raises(ValueError, match="the optimizer has 10 parameters"):
        distill(teacher, teacher, [IMAGES], LAYERS, progress=False)
    teacher.middle.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    distill(teacher, student, [IMAGES], LAYERS, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_losses_without_a_gradient(networks):
    """A frozen tapped layer, an output that is computed without gradients, or a call under no_grad."""
    teacher, student = networks
    student.encoder.requires_grad_(False)
    with pytest.raises(RuntimeError, match="student layer 'encoder' requires no gradient"):
        distill(teacher, student, [IMAGES], LAYERS, progress=False)
    distill(teacher, student, [IMAGES], LAYERS, lambda_srp=0, progress=False)  # the layer is not compared
    student.head.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RuntimeError, match="the student's output requires no gradient"):
        distill(teacher, student, [IMAGES], LAYERS, lambda_srp=0, progress=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="call distill outside"):
        distill(teacher, student, [IMAGES], LAYERS, progress=False)


class Conditional(nn.Module):
    """A generator of an image and a condition, with two outputs, as in diffusion models."""

    def __init__(self, width: int, kind: str = "object") -> None:
        super().__init__()
        self.kind = kind
        self.encoder, self.embed = nn.Conv2d(3, width, 1), nn.Embedding(4, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, image: Tensor, label: Tensor) -> object:
        features = self.encoder(image) + self.embed(label)[..., None, None]
        output = self.head(features)
        return {
            "tensor": output,
            "tuple": (features, output),
            "dict": {"features": features, "sample": output},
            "object": types.SimpleNamespace(sample=output, features=features),
            "nested": [{"outputs": (output,)}],
        }[self.kind]


CONDITIONAL = [{"image": IMAGES, "prompt": ["a"] * 6, "more": (torch.arange(6) % 4, None)}]


def run_conditional(network: nn.Module, batch: dict) -> object:
    return network(batch["image"], batch["more"][0])


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("tensor", None),
        ("tensor", "sample"),  # a tensor is compared as it is
        ("tuple", 1),
        ("tuple", -1),
        ("tuple", "[1]"),
        ("dict", "sample"),
        ("object", "sample"),
        ("object", lambda output: output.sample),
        ("nested", "[0][outputs][0]"),
    ],
)
def test_batches_and_outputs_of_any_structure(kind, output):
    teacher, student = Conditional(7, kind), Conditional(5, kind)
    image, label, targets = IMAGES, CONDITIONAL[0]["more"][0], IMAGES.flip(0)
    expected = copy.deepcopy((teacher, student))
    for network in expected:
        network.kind = "tensor"
    (means,) = distill(
        teacher,
        student,
        CONDITIONAL,
        LAYERS,
        forward=run_conditional,
        output=output,
        target=lambda batch: batch["image"].flip(0),
        lambda_kd=1.0,
        lambda_srp=1.0,
        lambda_target=1.0,
        progress=False,
    )
    theirs, ours = (network(image, label) for network in expected)
    srp = SRPLoss()(expected[1].encoder(image), expected[0].encoder(image).detach())
    kd, target = (ours - theirs).abs().mean(), (ours - targets).abs().mean()
    assert means == pytest.approx({"kd": kd.item(), "srp": srp.item(), "target": target.item()}, rel=1e-5)
    assert not torch.equal(student.head.weight, expected[1].head.weight)
    assert not torch.equal(student.embed.weight, expected[1].embed.weight)


def test_networks_of_different_outputs():
    """The student returns a tensor, the teacher an object; the output is a field of it."""
    options = {"forward": run_conditional, "progress": False}
    history = distill(Conditional(7), Conditional(5, "tensor"), CONDITIONAL, LAYERS, output="sample", **options)
    assert history[0].keys() == {"kd", "srp"}
    history = distill(Conditional(7), Conditional(5, "tuple"), CONDITIONAL, LAYERS, lambda_kd=0, **options)
    assert history[0].keys() == {"srp"}  # no output is compared


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, TypeError, r"the student gave a dict with the keys 'features', 'sample'; expected .* pass output="),
        (
            {"output": "image"},
            ValueError,
            r"output='image': the student's output has no element \[image\] in a dict with",
        ),
        (
            {"output": lambda output: output},
            TypeError,
            "the student gave a dict .*, of which output= selects a dict with",
        ),
        ({"output": 1.5}, TypeError, "output: expected a field such as 'sample', .* received float"),
        ({"output": "sample", "target": lambda batch: batch["more"]}, TypeError, "the target is a tuple"),
        ({"target": "sample"}, TypeError, "target: expected a function of a batch"),
        ({"on_step": "log"}, TypeError, "on_step: expected a function of .* received str"),
        ({"forward": None, "target": lambda batch: IMAGES}, TypeError, "target: .* together with forward="),
    ],
)
def test_wrong_structures(given, error, message):
    with pytest.raises(error, match=message):
        distill(
            Conditional(7, "dict"),
            Conditional(5, "dict"),
            CONDITIONAL,
            LAYERS,
            progress=False,
            **{"forward": run_conditional, **given},
        )


def test_non_finite_loss_stops_before_the_update(networks):
    teacher, student = networks
    student.encoder[1] = nn.BatchNorm2d(5)  # the forward pass changes its running statistics
    broken = IMAGES.clone()
    broken[0, 0, 0, 0] = torch.nan
    states = []
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is not finite \(.*'kd': nan.*\)"):
        distill(
            teacher,
            student,
            [IMAGES, broken],
            LAYERS,
            progress=False,
            on_step=lambda *_: states.append(copy.deepcopy(student.state_dict())),
        )
    assert all(torch.equal(value, states[-1][key]) for key, value in student.state_dict().items())
    assert not any(module._forward_hooks for net in networks for module in net.modules())


def test_without_tqdm(networks, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pass progress=False.*pip install \"srpkd\[train\]\""):
        distill(*networks, [IMAGES], LAYERS)
    assert len(distill(*networks, [IMAGES], LAYERS, progress=False)) == 1
