import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srpkd import SRPLoss
from srpkd.models.networks import default_tap, define_generator
from srpkd.taps import FeatureTap
from srpkd.training.student_teacher import StudentTeacher, feature_shapes

SIZE = 16
WEIGHTS = ("lambda_kd", "lambda_srp", "lambda_feature")


def generator(netG: str = "resnet_1blocks", ngf: int = 2, **others) -> nn.Module:
    return define_generator(netG, ngf=ngf, init_gain=0.1, **others)


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def make_pair(
    student: nn.Module, teacher: nn.Module, layers: dict[str, str] | None = None, size: int = SIZE, **weights: float
) -> StudentTeacher:
    layers = layers or {default_tap(student): default_tap(teacher)}
    return StudentTeacher(
        student, teacher, layers, SRPLoss(), **dict.fromkeys(WEIGHTS, 0.0) | weights, input_shape=(3, size, size)
    )


def images(size: int = SIZE) -> Tensor:
    return torch.rand(2, 3, size, size) * 2 - 1


def counted(network: nn.Module) -> list[Tensor]:
    """A list of the network's inputs, which grows with each forward pass."""
    calls: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    return calls


def not_in_place(network: nn.Module) -> nn.Module:
    """A copy without in-place activations."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return network


def features(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """A layer's output, copied in a forward hook."""
    found = []
    handle = network.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output + 0))
    network(x)
    handle.remove()
    return found[0]


# The losses


@pytest.mark.parametrize(
    "weights", [{"lambda_kd": 3}, {"lambda_srp": 5}, {"lambda_feature": 7}, dict.fromkeys(WEIGHTS, 2)]
)
def test_losses_match_their_definitions(weights):
    student, teacher, x = generator(), frozen(generator("resnet_2blocks", ngf=3)), images()
    pair = make_pair(student, teacher, **weights)
    output, losses = pair(x)
    assert torch.equal(output, student(x)) and output.requires_grad
    ours, theirs = features(student, "model.9", x), features(teacher, "model.9", x)
    expected = {"kd": (output - teacher(x)).abs().mean(), "srp": SRPLoss()(ours, theirs)}
    if "lambda_feature" in weights:
        expected["feature"] = F.mse_loss(pair.adapters[0](ours), theirs)
    expected = {
        name: weights[f"lambda_{name}"] * loss for name, loss in expected.items() if f"lambda_{name}" in weights
    }
    torch.testing.assert_close(losses, expected)


def test_losses_of_several_layers_are_summed():
    student, teacher, x = generator("resnet_2blocks"), frozen(generator("resnet_3blocks", ngf=3)), images()
    layers = {"model.9": "model.9", "model.11": "model.12", "model.1": "model.1"}
    pair = make_pair(student, teacher, layers, lambda_srp=2, lambda_feature=3)
    _, losses = pair(x)
    pairs = [(features(student, ours, x), features(teacher, theirs, x)) for ours, theirs in layers.items()]
    torch.testing.assert_close(losses["srp"], 2 * sum(SRPLoss()(ours, theirs) for ours, theirs in pairs))
    matches = [F.mse_loss(adapter(a), b) for adapter, (a, b) in zip(pair.adapters, pairs, strict=True)]
    torch.testing.assert_close(losses["feature"], 3 * sum(matches))


@pytest.mark.parametrize(
    ("weights", "shape_runs"),
    [({"lambda_kd": 1}, 0), ({"lambda_srp": 1}, 1), ({"lambda_feature": 1}, 1)],
    ids=str,
)
def test_terms_of_weight_0_are_not_computed(weights, shape_runs):
    """One pass of a zero image for the shapes, if features are compared; then one pass of each network."""
    student, teacher = generator(), frozen(generator())
    students, teachers = counted(student), counted(teacher)
    pair = make_pair(student, teacher, **weights)
    assert len(students) == len(teachers) == shape_runs
    assert all(x.shape == (1, 3, SIZE, SIZE) for x in students + teachers)
    assert bool(pair.adapters) == ("lambda_feature" in weights)
    students.clear()
    teachers.clear()
    x = images()
    _, losses = pair(x)
    assert len(students) == len(teachers) == 1
    assert all(given is x for given in students + teachers)
    assert losses.keys() == {name.removeprefix("lambda_") for name in weights}


# Gradients


@pytest.mark.parametrize("name", WEIGHTS)
def test_only_student_and_adapters_receive_gradients(name):
    student, teacher = generator(), frozen(generator(ngf=3))
    pair = make_pair(student, teacher, **{name: 1})
    _, losses = pair(images())
    [loss] = losses.values()
    loss.backward()
    encoder, decoder = student.model[1].weight, student.model[-2].weight
    assert encoder.grad.abs().sum() > 0
    assert (decoder.grad is None) == (name != "lambda_kd")  # the default tap is before the decoder
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in pair.adapters.parameters())


def test_teacher_is_not_a_submodule():
    student, teacher = generator(), frozen(generator(ngf=3))
    pair = make_pair(student, teacher, lambda_feature=1)
    assert {id(p) for p in pair.parameters()} == {
        id(p) for module in (student, pair.adapters) for p in module.parameters()
    }
    pair.train()
    assert not teacher.training and student.training
    [adapter] = pair.adapters
    assert (adapter.in_channels, adapter.out_channels, adapter.kernel_size) == (8, 12, (1, 1))


def test_teacher_that_requires_gradients_receives_none():
    student, teacher = generator(), generator(ngf=3)  # not frozen by the caller
    _, losses = make_pair(student, teacher, **dict.fromkeys(WEIGHTS, 1))(images())
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["lambda_srp", "lambda_feature"])
def test_frozen_layer_of_a_student_in_training_raises(name):
    student = generator()
    student.model[:10].requires_grad_(False)
    pair = make_pair(student, frozen(generator(ngf=3)), {"model.9": "model.9"}, **{name: 1})
    with pytest.raises(RuntimeError, match=r"student layer 'model\.9' requires no gradient"):
        pair(images())
    with torch.no_grad():
        assert pair(images())[1][name.removeprefix("lambda_")].isfinite()


def test_close_removes_the_hooks():
    student, teacher = generator(), frozen(generator())
    pair = make_pair(student, teacher, lambda_srp=1)

    def hooks() -> int:
        return sum(len(m._forward_hooks) for network in (student, teacher) for m in network.modules())

    assert hooks() == 2
    pair.close()
    assert hooks() == 0


# Shapes and layers, before the first step


def test_unknown_layer_lists_the_nearest_names():
    with pytest.raises(
        ValueError, match=r"the teacher has no module named 'model\.99'; the nearest names are 'model\.9'"
    ):
        make_pair(generator(), frozen(generator()), {"model.9": "model.99"}, lambda_srp=1)


@pytest.mark.parametrize("weights", [{"lambda_srp": 1}, {"lambda_feature": 1}])
def test_features_of_different_sizes_raise_before_the_first_step(weights):
    message = (
        r"student layer 'model\.4' gives \(4, 8, 8\) and teacher layer 'model\.9' \(12, 4, 4\) \(C, H, W\) for an "
        r"image of the training size: tap layers of the same height and width"
    )
    with pytest.raises(ValueError, match=message):
        make_pair(generator(), frozen(generator(ngf=3)), {"model.4": "model.9"}, **weights)


def test_layer_of_one_pixel_raises_before_the_first_step():
    """The deepest level of a U-Net."""
    student, teacher = generator("unet_64"), frozen(generator("unet_64"))
    deepest = "model.model.1" + 4 * ".model.3" + ".model.1"
    with pytest.raises(ValueError, match=rf"student layer '{deepest}': .*\(16, 1, 1\) have one pixel"):
        make_pair(student, teacher, {deepest: deepest}, size=64, lambda_srp=1)
    make_pair(student, teacher, {deepest: deepest}, size=64, lambda_feature=1)


class Idle(nn.Module):
    """A network with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_tapped_layer_that_does_not_run_raises():
    layers = {"used": "used", "idle": "idle"}
    with pytest.raises(RuntimeError, match=r"student layers \['idle'\] did not run in this pass"):
        make_pair(Idle(), Idle(), layers, lambda_srp=1)
    pair = make_pair(Idle(), Idle(), {"used": "used"}, lambda_srp=1)
    pair.relations.student.forward = lambda x: x  # the layer no longer runs
    with pytest.raises(RuntimeError, match=r"student layers \['used'\] did not run in this pass"):
        pair(images())


def test_other_passes_are_not_recorded():
    student, teacher, x = generator(), frozen(generator(ngf=3)), images()
    pair = make_pair(student, teacher, lambda_srp=1)
    _, losses = pair(x)
    for _ in range(2):  # like the cycle and identity passes of CycleGAN
        student(images())
    torch.testing.assert_close(pair(x)[1], losses)


# The pass that finds the shapes


@pytest.mark.parametrize("netG", ["resnet_1blocks", "unet_16"])
def test_construction_does_not_change_the_networks(netG):
    student, teacher = generator(netG, norm="batch", dropout=True), frozen(generator(netG, norm="batch", ngf=3))
    student.model[0].eval()  # modes differ between modules
    before = [copy.deepcopy(network.state_dict()) for network in (student, teacher)]
    modes = [[m.training for m in network.modules()] for network in (student, teacher)]
    state = torch.get_rng_state()
    make_pair(student, teacher, lambda_srp=1)
    assert torch.equal(torch.get_rng_state(), state)  # not even dropout drew a random number
    for network, old, mode in zip((student, teacher), before, modes):
        assert all(torch.equal(value, old[key]) for key, value in network.state_dict().items())
        assert [m.training for m in network.modules()] == mode
        assert all(p.grad is None for p in network.parameters())


def test_modes_are_restored_after_an_error():
    network = Idle().train()
    with pytest.raises(RuntimeError, match="did not run"):
        feature_shapes(FeatureTap(network, ["idle"]), network, images())
    assert all(module.training for module in network.modules())


def test_feature_shapes():
    network = generator("resnet_2blocks", ngf=3)
    tap = FeatureTap(network, ["model.1", "model.9", "model.11"])
    shapes = feature_shapes(tap, network, torch.zeros(1, 3, 16, 24))
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        "model.1": (3, 16, 24),
        "model.9": (12, 4, 6),
        "model.11": (12, 4, 6),
    }


# In-place activations


@pytest.mark.parametrize(
    ("netG", "layer"),
    [
        ("resnet_1blocks", "model.9"),
        ("resnet_1blocks", "model.10"),
        ("resnet_1blocks", "model.8"),  # the norm before an in-place ReLU
        ("unet_32", None),
        ("unet_32", "model.model.0"),  # the conv before an in-place LeakyReLU
        ("unet_32", "model.model.1.model.2"),  # the norm before one
    ],
)
def test_taps_record_the_output_of_the_layer(netG, layer):
    student, teacher = generator(netG, norm="batch"), frozen(generator(netG, ngf=3, norm="batch"))
    layer = layer or default_tap(student)
    x = images(32)
    results = []
    for networks in ((student, teacher), (not_in_place(student), not_in_place(teacher))):
        torch.manual_seed(1)  # initialises the adapter
        pair = make_pair(*networks, {layer: layer}, size=32, lambda_srp=1, lambda_feature=1)
        losses = pair(x)[1]
        (losses["srp"] + losses["feature"]).backward()
        grads = [p.grad for p in networks[0].parameters() if p.grad is not None]
        results.append((losses, grads))
    # bit-identical: the same operations on the same numbers
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_default_tap_of_a_unet_computed_step_by_step():
    network, x = frozen(generator("unet_32", norm="batch")), images(32)
    name = default_tap(network)
    tap = FeatureTap(network, [name])
    with tap.recording() as found, torch.no_grad():
        network(x)
    # level by level down to it: conv, then (LeakyReLU, conv, norm), then the tapped LeakyReLU
    outermost = network.model.model
    value, block = outermost[0](x), outermost[1]
    for _ in range(name.count(".model.3")):
        value = block.model[2](block.model[1](F.leaky_relu(value, 0.2)))
        block = block.model[3]
    expected = F.leaky_relu(value, 0.2)
    assert (expected < 0).any() and expected.shape[-1] == 16
    torch.testing.assert_close(found[name], expected)
