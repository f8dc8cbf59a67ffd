"""The distiller that compares tapped features."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tapped import COPIES, hooks, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from srpkd import RelationDistiller, SRPLoss, relation_loss

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the distiller --------------------------------------------------------------------------------------------------


def test_one_layer(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"})
    output, teacher_output, loss = distiller(image)
    assert torch.equal(output, student(image))
    assert torch.equal(teacher_output, teacher(image))
    torch.testing.assert_close(loss, relation_loss(student.encoder(image), teacher.encoder(image).detach()))


def test_several_layers_with_weights_and_another_loss(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """Several layers of different names and sizes; a teacher's layer may be used twice."""
    layers = {"encoder.conv": "encoder.norm", "encoder.act": "encoder.norm", "decoder": "encoder"}
    weights = {"encoder.conv": 0.5, "decoder": 3}
    loss_fn = SRPLoss("cosine", "huber", delta=0.1)
    *_, loss = RelationDistiller(student, teacher, layers, loss_fn, weights)(image)

    def run(network: nn.Module) -> dict[str, Tensor]:
        conv = network.encoder.conv(image)
        norm = F.instance_norm(conv)
        act = norm.relu()
        return {
            "encoder.conv": conv,
            "encoder.norm": norm,
            "encoder.act": act,
            "encoder": act,
            "decoder": network.decoder(act),
        }

    ours, theirs = run(student), {name: feature.detach() for name, feature in run(teacher).items()}
    expected = sum(weights.get(name, 1) * loss_fn(ours[name], theirs[other]) for name, other in layers.items())
    torch.testing.assert_close(loss, expected)


def test_a_schedule_may_change_weights(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"})
    full = distiller(image)[2]
    distiller.weights["encoder"] = 0.25
    torch.testing.assert_close(distiller(image)[2], full / 4)
    distiller.weights["encodr"] = 0.5
    with pytest.raises(ValueError, match=r"weights names layers \['encodr'\] that are not tapped"):
        distiller(image)


def test_forward_runs_both_networks(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(
        student, teacher, {"encoder": "encoder"}, forward=lambda network, batch, scale: network(scale * batch["image"])
    )
    output, teacher_output, loss = distiller({"image": image}, scale=2)
    assert torch.equal(output, student(2 * image)) and torch.equal(teacher_output, teacher(2 * image))
    torch.testing.assert_close(loss, relation_loss(student.encoder(2 * image), teacher.encoder(2 * image).detach()))
    with pytest.raises(TypeError, match=r"forward: expected a function forward\(network, batch\), received str"):
        RelationDistiller(student, teacher, {"encoder": "encoder"}, forward="forward")


def test_layers_may_be_elements_of_a_tuple(image: Tensor) -> None:
    class Pair(nn.Conv2d):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = super().forward(x)
            return x, x.square()

    student, teacher = nn.Sequential(Pair(3, 4, 1)), nn.Sequential(Pair(3, 6, 1))
    distiller = RelationDistiller(student, teacher, {"0[0]": "0[0]", "0[1]": "0[1]"}, weights={"0[1]": 2.0})
    ours, theirs = student(image), [feature.detach() for feature in teacher(image)]
    expected = relation_loss(ours[0], theirs[0]) + 2 * relation_loss(ours[1], theirs[1])
    torch.testing.assert_close(distiller(image)[2], expected)


def test_only_the_student_receives_gradients(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"})
    output, teacher_output, loss = distiller(image)
    (loss + output.mean()).backward()
    assert student.encoder.conv.weight.grad.abs().sum() > 0
    assert not teacher_output.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert list(distiller.parameters()) == list(student.parameters())
    assert set(distiller.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert distiller.teacher is teacher


def test_the_teacher_keeps_its_mode(student: nn.Module, teacher: nn.Module) -> None:
    distiller = RelationDistiller(student, teacher.eval(), {"encoder": "encoder"})
    distiller.train()
    assert student.training
    assert not teacher.training


def test_training_reduces_the_loss(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"})
    optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        *_, loss = distiller(image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_equal_networks_have_zero_loss(teacher: nn.Module, image: Tensor) -> None:
    twin = network(6)
    twin.load_state_dict(teacher.state_dict())
    *_, loss = RelationDistiller(twin, teacher, {"encoder.norm": "encoder.norm"})(image)
    loss.backward()
    assert loss == 0
    assert not twin.encoder.conv.weight.grad.any()


def test_mismatch_names_the_layers(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    teacher.encoder.conv.stride = (1, 1)
    distiller = RelationDistiller(student, teacher, {"encoder.norm": "encoder.act"})
    with pytest.raises(
        ValueError,
        match=r"student layer 'encoder.norm' with teacher layer 'encoder.act'.*\(2, 4, 4, 4\).*\(2, 6, 8, 8\)",
    ):
        distiller(image)
    *_, loss = RelationDistiller(student, network(6), {"encoder.norm": "encoder.act"})(image)
    assert loss.isfinite()


def test_wrong_arguments_leave_no_hooks(student: nn.Module, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"teacher has no module named 'encoder\.none'"):
        RelationDistiller(student, teacher, {"encoder": "encoder", "decoder": "encoder.none"})
    assert hooks(teacher) == hooks(student) == 0
    with pytest.raises(TypeError, match="the teacher: expected a"):
        RelationDistiller(student, None, {"encoder": "encoder"})
    with pytest.raises(ValueError, match=r"\['decoder'\] that are not tapped"):
        RelationDistiller(student, teacher, {"encoder": "encoder"}, weights={"decoder": 1.0})
    with pytest.raises(ValueError, match=r"the student has no module named 'encoder\.cnov'"):
        RelationDistiller(student, teacher, {"encoder.cnov": "encoder"})
    assert hooks(teacher) == hooks(student) == 0


def test_error_of_a_teacher_that_was_not_converted(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """Frameworks convert and move the distiller, and with it only the student."""
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"}).double()
    with pytest.raises(RuntimeError) as caught:
        distiller(image.double())
    note = "The teacher is torch.float32 on cpu and the student torch.float64 on cpu.*distiller.teacher.to"
    assert re.match(note, caught.value.__notes__[0])
    distiller.teacher.double()
    assert distiller(image.double())[2].dtype == torch.float64
    with pytest.raises(RuntimeError, match="channels") as caught:  # of another cause
        distiller(image[:, :2].double())
    assert not hasattr(caught.value, "__notes__")


def test_teacher_can_be_replaced_like_the_student(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """By a compiled one, for example, without becoming a part of what is trained and saved."""
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder"})
    expected, names = distiller(image), list(distiller.state_dict())
    wrapper = nn.Sequential(teacher)
    distiller.teacher = wrapper
    torch.testing.assert_close(distiller(image), expected)
    assert distiller.teacher is wrapper and list(distiller.state_dict()) == names
    distiller.teacher = network(6)
    with pytest.raises(RuntimeError, match=r"teacher layers \['encoder'\] did not run"):
        distiller(image)
    with pytest.raises(TypeError, match=r"the teacher: expected a torch.nn.Module, received NoneType"):
        distiller.teacher = None


def test_close_removes_the_hooks(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder", "decoder": "encoder"})
    assert (hooks(student), hooks(teacher)) == (2, 1)
    distiller.close()
    assert hooks(student) == hooks(teacher) == 0
    with pytest.raises(RuntimeError, match=r"hooks on the teacher were removed by close\(\): create a new tap or dist"):
        distiller(image)
    distiller.close()  # closing twice is allowed


def test_a_dropped_distiller_leaves_no_hooks(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    RelationDistiller(student, teacher, {"encoder": "encoder"})(image)[2].backward()
    assert hooks(student) == hooks(teacher) == 1
    student(image), teacher(image)
    assert hooks(student) == hooks(teacher) == 0


def test_two_distillers_of_one_teacher(teacher: nn.Module, image: Tensor) -> None:
    first, second = (RelationDistiller(network(4), teacher, {"encoder": "encoder"}) for _ in range(2))
    for distiller in (first, second, first):
        *_, loss = distiller(image)
        expected = relation_loss(distiller.student.encoder(image), teacher.encoder(image).detach())
        torch.testing.assert_close(loss, expected)


def test_repr_shows_layers_and_weights(student: nn.Module, teacher: nn.Module) -> None:
    text = repr(RelationDistiller(student, teacher, {"encoder": "encoder.act"}, weights={"encoder": 2.0}))
    assert "layers={'encoder': 'encoder.act'}, weights={'encoder': 2.0}" in text


def test_teacher_that_changes_its_input_raises(student: nn.Module, image: Tensor) -> None:
    """The student would get other images, without a word."""
    teacher = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 6, 3, stride=2, padding=1))
    layers, original = {"encoder": "1"}, image.clone()
    with pytest.raises(RuntimeError, match=r"the teacher changed its input in place, .* network\(images.clone"):
        RelationDistiller(student, teacher, layers)(image)
    image = original.clone()
    distiller = RelationDistiller(student, teacher, layers, forward=lambda network, batch: network(batch["x"].clone()))
    loss = distiller({"x": image})[2]
    torch.testing.assert_close(loss, relation_loss(student.encoder(image), teacher(image.clone()).detach()))
    with torch.inference_mode():
        copied = original.clone()  # has no version
    with torch.no_grad():
        assert torch.equal(distiller({"x": copied})[2], loss)


def test_forward_that_changes_the_batch_itself_raises(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """The student would get images that are normalised twice, or a batch without them."""
    layers = {"encoder": "encoder"}

    def normalised(network: nn.Module, batch: dict[str, Tensor], key: str) -> Tensor:
        batch[key] = 2 * batch["x"] - 1
        return network(batch[key])

    with pytest.raises(RuntimeError, match=r"replaced or removed a tensor .* network\(dict\(batch\)\)"):
        RelationDistiller(student, teacher, layers, forward=normalised)({"x": image}, "x")
    with pytest.raises(RuntimeError, match="replaced or removed"):
        RelationDistiller(student, teacher, layers, forward=lambda network, batch: network(batch.pop()))([image])
    added = RelationDistiller(student, teacher, layers, forward=normalised)({"x": image}, "normalised")[2]
    torch.testing.assert_close(added, RelationDistiller(student, teacher, layers)(2 * image - 1)[2])

    def moved(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """As batch.to(device) of transformers does."""
        batch["x"] = batch["x"].to(torch.float32, copy=True)
        return network(batch["x"])

    loss = RelationDistiller(student, teacher, layers, forward=moved)({"x": image})[2]
    assert torch.equal(loss, RelationDistiller(student, teacher, layers)(image)[2])


def test_teacher_that_enables_gradients(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """Such as one that differentiates in its forward."""

    def run(network: nn.Module, images: Tensor) -> Tensor:
        with torch.enable_grad():
            return network(images)

    layers = {"encoder": "encoder"}
    *_, loss = RelationDistiller(student, teacher, layers, forward=run)(image)
    assert torch.equal(loss, RelationDistiller(student, teacher, layers)(image)[2])


# --- copies ---


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_of_a_distiller_has_its_own_taps(make_copy, student, teacher, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder": "encoder", "decoder": "encoder"})
    *_, loss = distiller(image)
    twin = make_copy(distiller)
    assert twin.student is not student and twin.teacher is not teacher
    with torch.no_grad():
        student.encoder.conv.weight.neg_()
    *_, same = twin(image)
    torch.testing.assert_close(same, loss)
    assert torch.autograd.grad(same, twin.student.encoder.conv.weight)[0].any()
    twin.close()
    assert (hooks(twin.student), hooks(twin.teacher)) == (0, 0)
    assert (hooks(student), hooks(teacher)) == (2, 1)
    distiller(image)


def test_copies_of_both_networks_can_be_distilled(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    first = RelationDistiller(student, teacher, {"encoder": "encoder"})
    *_, loss = first(image)
    second = RelationDistiller(copy.deepcopy(student), copy.deepcopy(teacher), {"encoder": "encoder"})
    torch.testing.assert_close(second(image)[2], loss)
    torch.testing.assert_close(first(image)[2], loss)


# --- features without a gradient ------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A network whose encoder runs under activation checkpointing, under no_grad, or as usual."""

    def __init__(self, mode: str, width: int = 4) -> None:
        super().__init__()
        self.mode = mode
        self.stem, self.encoder, self.decoder = (
            nn.Conv2d(3, width, 1),
            nn.Conv2d(width, width, 3),
            nn.Conv2d(width, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.mode == "no_grad":
            with torch.no_grad():
                return self.decoder(self.encoder(x))
        if self.mode == "usual":
            return self.decoder(self.encoder(x))
        return self.decoder(checkpoint(self.encoder, x, use_reentrant=self.mode == "reentrant"))


def test_checkpointing_without_reentry_is_exact(image: Tensor) -> None:
    results = []
    for mode in ("usual", "not reentrant"):
        torch.manual_seed(0)
        student, teacher = Checkpointed(mode), Checkpointed("usual", 6)
        output, _, loss = RelationDistiller(student, teacher, {"encoder": "encoder"})(image)
        (loss + output.mean()).backward()
        assert student.encoder.weight.grad.any()
        results.append((loss, *(parameter.grad for parameter in student.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, if use_reentrant=True
@pytest.mark.parametrize("mode", ["reentrant", "no_grad"])
def test_feature_without_a_gradient_raises(mode: str, image: Tensor) -> None:
    student = Checkpointed(mode)
    distiller = RelationDistiller(student, Checkpointed("usual"), {"encoder": "encoder"})
    with pytest.raises(RuntimeError, match=r"student layer 'encoder' requires no gradient.*use_reentrant=False"):
        distiller(image)
    distiller.run(image, record_features=False)  # nothing is compared
    with torch.no_grad():  # a validation
        *_, loss = distiller(image)
    assert loss.isfinite() and not loss.requires_grad


def test_frozen_layer_raises_unless_the_student_is_not_trained(student: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, network(6), {"decoder": "decoder", "encoder.norm": "encoder.norm"})
    student.encoder.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"student layer 'encoder.norm' requires no gradient.*frozen"):
        distiller(image)
    *_, loss = distiller(image.clone().requires_grad_())  # the gradient of the input is computed
    assert loss.requires_grad
    student.requires_grad_(False)
    *_, loss = distiller(image)
    assert loss.isfinite() and not loss.requires_grad


@pytest.mark.usefixtures("fresh_compiler")
def test_student_compiled_after_tapping(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """Features of each pass, also before in-place activations, and their gradients are those without torch.compile."""
    distiller = RelationDistiller(student, teacher, {"encoder.norm": "encoder.norm", "decoder": "encoder"})
    results = []
    for compiled in (False, True):
        if compiled:
            distiller.student = torch.compile(student, backend="aot_eager")
        for scale in (1, -3):  # the second pass reuses the graph of the first
            output, _, loss = distiller(scale * image)
            results.append((output.detach(), loss.detach(), *torch.autograd.grad(loss, student.parameters())))
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_student_tapped_after_compilation(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """The compiler may or may not see late hooks: the distiller works, or raises instead of using stale features."""
    compiled = torch.compile(student, backend="aot_eager")
    compiled(image)
    distiller = RelationDistiller(compiled, teacher, {"encoder": "encoder"})
    try:
        *_, loss = distiller(image)
    except RuntimeError as error:
        assert "before torch.compile" in str(error)
    else:
        torch.testing.assert_close(loss, relation_loss(student.encoder(image), teacher.encoder(image).detach()))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_distiller_is_one_graph(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    distiller = RelationDistiller(student, teacher, {"encoder.norm": "encoder.norm", "decoder": "encoder"})
    results = []
    for run in (distiller, torch.compile(distiller, backend="aot_eager", fullgraph=True)):
        output, _, loss = run(image)
        results.append((output.detach(), loss.detach(), *torch.autograd.grad(loss, student.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
