"""The relation loss between tapped layers of a student and its teacher."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_choice, check_number, check_type
from .layouts import (
    LAYOUTS,
    SHAPES,
    Layout,
    check_dense,
    check_dimensions,
    convert,
    warn_if_unlikely,
)
from .loss import ONE_PIXEL, SRPLoss, is_constant
from .structures import tensors_in
from .taps import FeatureTap

FeatureLoss = Callable[[Tensor, Tensor], Tensor]
LayerLayout = Layout | tuple[Layout, Layout]  # of both features, or of the student's and the teacher's


class ForwardPasses(NamedTuple):
    """Outputs and tapped features of a student and its teacher on the same input."""

    student_output: Any
    teacher_output: Any
    student_features: dict[str, Tensor]
    teacher_features: dict[str, Tensor]


class RelationDistiller(nn.Module):
    """The relation loss between layers of a student and a teacher, tapped by name.

        distiller = RelationDistiller(student, teacher, layers={"model.9": "model.9"})
        output, teacher_output, loss = distiller(images)

    The teacher runs without gradients, in its current mode (train or eval). It is not a submodule of the distiller:
    ``parameters()`` and ``state_dict()`` are those of the student, with the prefix ``student.``, and ``to()`` does not
    move the teacher.

    Args:
        student: network to train.
        teacher: network that takes the same input.
        layers: student module name -> teacher module name; their features may differ only in channels.
        loss: loss of two features (B, C, H, W); by default ``SRPLoss()``. Or student module name -> loss; layers that
            it does not name have the default.
        weights: student module name -> weight of the layer's loss; by default 1. A schedule may change them between
            steps: ``distiller.weights["model.9"] = 0.5``.
        layout: layout of the features, as in ``SRPLoss``: one for all layers, or student module name -> layout. Where
            the networks differ, a pair (student's, teacher's), such as ``("nchw", "nhwc")``. Features are brought to
            the layout that the loss expects (``"nchw"`` unless it is an ``SRPLoss`` of another one), which is also the
            default for features with four dimensions. Without a stated layout, a function receives them as they are.
        forward: how a network processes an input, ``forward(network, *inputs, **keywords)``; by default
            ``network(*inputs, **keywords)``. It is called for the teacher, then for the student, so random numbers that
            both need must be part of the input.

    Raises:
        TypeError: an argument has the wrong type, or a layer is part of a TorchScript module.
        ValueError: ``layers`` is empty, a name is not that of a module (the message lists the nearest names),
            ``loss``, ``weights`` or ``layout`` names a layer that is not tapped, or a layout does not exist.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str],
        loss: FeatureLoss | Mapping[str, FeatureLoss] | None = None,
        weights: Mapping[str, float] | None = None,
        layout: LayerLayout | Mapping[str, LayerLayout] | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        names = "{student module name: teacher module name, ...}"
        if not isinstance(layers, Mapping | None):
            raise TypeError(f"layers={layers!r}: expected {names}, received a {type(layers).__name__}")
        if not layers:
            raise ValueError(f"layers is empty: expected {names}")
        weights = {} if weights is None else weights
        check_type("weights", weights, Mapping, "{student module name: factor, ...}")
        for name, weight in weights.items():
            check_number(f"weights[{name!r}]", weight)
        losses = dict(loss) if isinstance(loss, Mapping) else {}
        default = SRPLoss() if loss is None or isinstance(loss, Mapping) else loss
        for name, value in {"loss": default, **{f"loss[{name!r}]": value for name, value in losses.items()}}.items():
            if isinstance(value, type) or not callable(value):
                check_type(name, value, nn.Module, "a module such as SRPLoss(), which compares two features")
        if forward is not None and not callable(forward):
            check_type("forward", forward, Callable, "a function forward(network, batch)")
        self._run_network = forward or _call
        self.layers, self.weights = dict(layers), dict(weights)
        layouts = dict(layout) if isinstance(layout, Mapping) else dict.fromkeys(self.layers, layout)
        self.layouts = {name: _layout_pair(value) for name, value in layouts.items() if value is not None}
        for option, named in (("weights", self.weights), ("loss", losses), ("layout", layouts)):
            self._check_names(option, named)
        self.student = student
        self._teacher = (teacher,)  # a tuple, so that the teacher is not registered as a submodule
        self.loss = default
        self.layer_losses = losses
        self._loss_modules = nn.ModuleList(module for module in losses.values() if isinstance(module, nn.Module))
        self._warned_layers: set[str] = set()
        self._image_shape: torch.Size | None = None  # of the last pass, to recognise layouts
        self.student_tap = FeatureTap(student, list(self.layers), "student")
        try:
            self.teacher_tap = FeatureTap(teacher, list(self.layers.values()), "teacher")
        except Exception:
            self.student_tap.close()
            raise

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        return self._teacher[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # a module would become a submodule, and the property would not change
            check_type("the teacher", value, nn.Module, "a torch.nn.Module")
            name, value = "_teacher", (value,)
        super().__setattr__(name, value)

    if TYPE_CHECKING:  # the type of a module's call is Any

        def __call__(self, *inputs: Any, **keywords: Any) -> tuple[Any, Any, Tensor]: ...

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Any, Any, Tensor]:
        """Run both networks on the same input. The errors are those of ``run`` and ``compare``.

        Returns:
            The student's output, the teacher's output, and the weighted sum of the layers' losses.
        """
        passes = self.run(*inputs, **keywords)
        loss = self.compare(passes.student_features, passes.teacher_features)
        return passes.student_output, passes.teacher_output, loss

    def run(self, *inputs: Any, record_features: bool = True, **keywords: Any) -> ForwardPasses:
        """Run both networks on the same input and record the tapped features, without a loss.

        Args:
            record_features: if False, both dicts of features stay empty.

        Raises:
            RuntimeError: a tapped layer did not run, or ran twice, ``close`` has removed the hooks, the teacher changed
                its input, or a feature of a student in training requires no gradient.
            TypeError: a tapped layer returned no tensor.
            ValueError: the output of a tapped layer has no element or field of that name.
        """
        # the compiler cannot trace versions
        given = () if torch.compiler.is_compiling() else (inputs, keywords)
        tensors = list(tensors_in(given))
        versions = _versions(tensors)
        if not torch.compiler.is_compiling():
            self._image_shape = next((tensor.shape for tensor in tensors if tensor.ndim == 4), None)
        with self.teacher_tap.recording(record_features) as teacher_features, torch.no_grad():
            try:
                teacher_output = self._run_network(self.teacher, *inputs, **keywords)
            except RuntimeError as error:
                if note := _different_placement(self.student, self.teacher):
                    error.add_note(note)
                raise
        if _versions(tensors) != versions:
            raise RuntimeError(
                "the teacher changed its input in place, so the student would get other values: give each network a "
                "copy, for example by forward=lambda network, images: network(images.clone())"
            )
        if _are_replaced(tensors, list(tensors_in(given))):
            raise RuntimeError(
                "the teacher, or forward with it, replaced or removed a tensor in the dict or list that is its input, "
                "so the student would get another input: give each network a copy, for example by "
                "forward=lambda network, batch: network(dict(batch))"
            )
        # a teacher may enable gradients itself, to differentiate in its forward
        teacher_features = {name: feature.detach() for name, feature in teacher_features.items()}
        with self.student_tap.recording(record_features) as student_features:
            student_output = self._run_network(self.student, *inputs, **keywords)
        for name, feature in student_features.items():
            check_gradient(self.student, feature, f"the feature of student layer {name!r}")
        return ForwardPasses(student_output, teacher_output, student_features, teacher_features)

    def compare(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the layers' losses.

        Args:
            student: features by module name, as ``run`` returns them.
            teacher: features by module name.

        Raises:
            ValueError: a pair of features differs in more than channels (the message names the layers), has three
                dimensions without a stated layout, or one pixel, for which the loss is a constant; or ``self.weights``
                names a layer that is not tapped.
            TypeError, BackendUnavailable: as the loss of the layer raises.
        """
        self._check_names("weights", self.weights)  # a schedule may have changed them
        losses = []
        for student_name, teacher_name in self.layers.items():
            try:
                loss = self._layer_loss(student_name, student[student_name], teacher[teacher_name])
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"student layer {student_name!r} with teacher layer {teacher_name!r}: {error}"
                ) from error
            losses.append(self.weights.get(student_name, 1.0) * loss)
        return total(losses)

    def _check_names(self, option: str, named: Iterable[str]) -> None:
        """Raise a ValueError unless all names are those of tapped layers of the student."""
        if unknown := [name for name in named if name not in self.layers]:
            raise ValueError(
                f"{option} names layers {unknown} that are not tapped: the tapped layers are {list(self.layers)}"
            )

    def _layer_loss(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of a layer, for features that are brought to the layout that it expects."""
        loss = self.layer_losses.get(name, self.loss)
        expected = loss.layout if isinstance(loss, SRPLoss) else "nchw"
        ours, theirs = self.layouts.get(name, (expected, expected))
        # without a stated layout, a function receives the features as they are, and may read them in any layout
        is_stated = isinstance(loss, SRPLoss) or name in self.layouts
        if is_stated and isinstance(student, Tensor) and isinstance(teacher, Tensor):
            check_dense("student", student)  # a nested tensor has no shape
            check_dense("teacher", teacher)
            if name not in self.layouts and expected != "nlc" and 3 in (student.ndim, teacher.ndim):
                raise ValueError(_missing_layout(student, teacher, expected))
            where = f"student layer {name!r} with teacher layer {self.layers[name]!r}: "
            images = None if torch.compiler.is_compiling() else self._image_shape
            if name not in self._warned_layers and warn_if_unlikely(student, teacher, (ours, theirs), where, images):
                self._warned_layers.add(name)
            if isinstance(loss, SRPLoss) and (images is not None or name in self._warned_layers):
                loss.has_warned = True  # it would judge by the shape alone, and warn without the names
            if student.requires_grad and torch.is_grad_enabled():
                check_has_relations(loss, student.shape, ours)
        if (ours, theirs) != (expected, expected):
            check_dimensions(student, teacher, (ours, theirs))
            converted = (
                convert(student, ours, expected, teacher, theirs),
                convert(teacher, theirs, expected, student, ours),
            )
            try:
                return loss(*converted)
            except ValueError as error:
                raise ValueError(
                    f"{error}. These are the features {tuple(student.shape)}, layout={ours!r}, and "
                    f"{tuple(teacher.shape)}, layout={theirs!r}, after the conversion to layout={expected!r}"
                ) from error
        return loss(student, teacher)

    def close(self) -> None:
        """Remove the hooks from both networks."""
        self.student_tap.close()
        self.teacher_tap.close()

    def extra_repr(self) -> str:
        options = {"layers": self.layers, "weights": self.weights, "layout": self.layouts}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value)


def _call(network: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    return network(*inputs, **keywords)


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return the number of changes in place of each tensor; those of inference tensors are not counted."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _are_replaced(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Return whether tensors are missing, except those whose copies are there, such as ones on another device."""
    kept = {id(tensor) for tensor in before} & {id(tensor) for tensor in after}
    missing, new = ([tensor for tensor in tensors if id(tensor) not in kept] for tensors in (before, after))
    return len(missing) > len(new) or not all(
        torch.equal(old.to(copy.device, copy.dtype), copy) for old, copy in zip(missing, new)
    )


def _different_placement(student: nn.Module, teacher: nn.Module) -> str:
    """Return a note for errors of a teacher that has another device or dtype than the student, or ''."""
    theirs, ours = (next(network.parameters(), None) for network in (teacher, student))
    if theirs is None or ours is None or (theirs.device, theirs.dtype) == (ours.device, ours.dtype):
        return ""
    return (
        f"The teacher is {theirs.dtype} on {theirs.device} and the student {ours.dtype} on {ours.device}: what moves "
        "or converts a RelationDistiller, such as .to() or a framework, leaves its teacher as it is. Use "
        f"distiller.teacher.to({str(ours.device)!r}, {ours.dtype})"
    )


def _layout_pair(layout: LayerLayout) -> tuple[Layout, Layout]:
    """Return the layouts of student and teacher; raise a ValueError if one does not exist."""
    pair = tuple(layout) if isinstance(layout, tuple | list) else (layout, layout)
    if len(pair) != 2:
        raise ValueError(f"layout={layout!r}: expected a layout, or a pair (student's, teacher's)")
    for name in pair:
        check_choice("layout", name, LAYOUTS)
    return pair


def _missing_layout(student: Tensor, teacher: Tensor, layout: Layout) -> str:
    """Return the error for features with three dimensions, tokens or a map without a batch, and no stated layout."""
    error = f"features of shape {tuple(student.shape)} and {tuple(teacher.shape)} need a layout: "
    if student.ndim == teacher.ndim:
        single = SHAPES[layout][1]
        return (
            f"{error}pass layout='nlc' for tokens (B, N, C), or layout={layout!r} for maps {single} without a batch; "
            "for sequences (B, C, N), such as those of nn.Conv1d, a loss that transposes them with features.mT"
        )
    pair = tuple("nlc" if features.ndim == 3 else layout for features in (student, teacher))
    return f"{error}pass layout={pair}, that of the student and of the teacher, if one has tokens (B, N, C)"


def check_has_relations(loss: Any, shape: Sequence[int], layout: Layout = "nchw") -> None:
    """Raise a ValueError if a relation loss is a constant because images have one pixel, related only to itself.

    Args:
        loss: loss of two features; anything but an ``SRPLoss`` is accepted.
        shape: shape of the student's features.
        layout: layout of the features.
    """
    if isinstance(loss, SRPLoss) and is_constant(loss, shape, layout):
        raise ValueError(f"student features {ONE_PIXEL.format(tuple(shape))}")


def total(losses: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one loss, added in order."""
    return reduce(operator.add, losses)


def check_gradient(student: nn.Module, value: Tensor, role: str) -> None:
    """Raise a RuntimeError if a value that a student computed would make a loss that is a constant.

    Under ``torch.no_grad()``, and for a student without a parameter that requires a gradient, any value is accepted.

    Args:
        student: network that computed the value.
        value: its output, or a feature.
        role: how the error calls the value.
    """
    if value.requires_grad or not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in student.parameters()):
        raise RuntimeError(
            f"{role} requires no gradient, so its loss would be a constant and train nothing. Usual causes: it is "
            "computed under reentrant checkpointing (pass use_reentrant=False to torch.utils.checkpoint.checkpoint, "
            "which gives the exact gradient), under torch.no_grad() or .detach(), or all parameters up to it are "
            "frozen (requires_grad=False). To compute the loss without training, use torch.no_grad()"
        )


@contextmanager
def preserved_modes(network: nn.Module) -> Iterator[None]:
    """Context after which each module of a network is in its previous mode, train or eval."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
