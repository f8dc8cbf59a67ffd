"""Features of named layers, and the relation loss between those of a student and its teacher."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_number, check_type
from .loss import SRPLoss


class FeatureTap:
    """Keeps what named modules of a network give out while ``recording()``; a hook each, removed by ``close()``.

    A feature is cloned: an in-place activation that follows the tapped module would overwrite it otherwise
    (in the public U-Net the next block's LeakyReLU does). Attach it before torch.compile: hooks that come
    later are not seen by compiled code, which shows as a layer that did not fire.

    Args:
        network: any module, also one wrapped by torch.compile or DataParallel.
        names: names of its submodules, as ``named_modules()`` has them.
        role: what errors call the network.

    Raises:
        TypeError: no module, or no list of names.
        ValueError: a name is not a submodule's; says which names are nearest.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], role: str = "network") -> None:
        check_type(f"the {role}", network, nn.Module, "a torch.nn.Module")
        if isinstance(names, str):
            raise TypeError(f"names={names!r}: expected a list of the {role}'s module names, such as [{names!r}]")
        self.role, self.features, self._active = role, {}, False
        modules = dict(unwrapped(network).named_modules())
        for name in names:
            if name not in modules or not name:
                nearest = difflib.get_close_matches(str(name), [other for other in modules if other], 5, cutoff=0)
                raise ValueError(
                    f"the {role} has no module named {name!r}; "
                    + (f"the nearest names are {', '.join(map(repr, nearest))}" if nearest else "it has no modules")
                )
        self.names = list(names)
        self._handles = [modules[name].register_forward_hook(self._hook(name)) for name in dict.fromkeys(names)]

    def _hook(self, name: str):
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._active:
                return
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"{self.role} module {name!r} gave a {type(output).__name__}; tap one that gives a tensor"
                )
            if name in self.features:
                raise RuntimeError(
                    f"{self.role} module {name!r} ran more than once in one pass, so its features are ambiguous: "
                    "tap a module that runs once"
                )
            self.features[name] = output.clone()

        return keep

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Record one forward pass: gives a dict that holds the features by name once the pass has run.

        Raises:
            RuntimeError: a tapped layer did not run, or ran twice, in the pass.
        """
        self.features, self._active = {}, True
        try:
            yield self.features
        finally:
            self._active = False
        silent = [name for name in self.names if name not in self.features]
        if silent:
            raise RuntimeError(
                f"{self.role} layers {silent} did not run in this pass: run the network inside the recording, "
                "tap layers that its forward uses, and attach taps before torch.compile"
            )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class RelationDistiller(nn.Module):
    """The relation loss between layers of a student and of a teacher, tapped by name.

        distiller = RelationDistiller(student, teacher, layers={"model.9": "model.9"})
        output, teacher_output, loss = distiller(images)

    The teacher runs without a gradient and in the mode (train or eval) that it is in. The student is a submodule of
    the distiller, the teacher is not: ``parameters()`` and ``state_dict()`` are the student's alone.

    Args:
        student, teacher: networks that take the same input.
        layers: student module name -> teacher module name; their features may differ in channels only.
        loss: how two features (B, C, H, W) are compared.
        weights: student module name -> factor of that layer's loss; 1 where not given.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no layers, a name that is no module's (the nearest are named), or a weight for an untapped layer.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[str, str],
        loss: nn.Module | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        names = "{student module name: teacher module name, ...}"
        if not isinstance(layers, Mapping | None):
            raise TypeError(f"layers={layers!r}: expected {names}, received a {type(layers).__name__}")
        if not layers:
            raise ValueError(f"layers is empty: expected {names}")
        check_type("the student", student, nn.Module, "a torch.nn.Module")
        check_type("weights", {} if weights is None else weights, Mapping, "{student module name: factor, ...}")
        for name, weight in (weights or {}).items():
            check_number(f"weights[{name!r}]", weight)
        if loss is not None and (isinstance(loss, type) or not callable(loss)):
            check_type("loss", loss, nn.Module, "a module such as SRPLoss(), which compares two features")
        self.student = student
        self._teacher = [teacher]  # in a list, lest it be registered as a submodule
        self.layers, self.weights = dict(layers), dict(weights or {})
        if unknown := [name for name in self.weights if name not in self.layers]:
            raise ValueError(f"weights name layers {unknown} that are not tapped: {list(self.layers)} are")
        self.loss = SRPLoss() if loss is None else loss
        self.student_tap = FeatureTap(student, list(self.layers), "student")
        try:
            self.teacher_tap = FeatureTap(teacher, list(self.layers.values()), "teacher")
        except ValueError:
            self.student_tap.close()  # a distiller that was never made leaves no hook behind
            raise

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Any, Any, Tensor]:
        """Run both networks on the same input: (student output, teacher output, weighted sum of the layers' losses).

        Raises:
            RuntimeError: a tapped layer did not run.
            ValueError: a pair of features differs in more than channels; names the layers.
        """
        with self.teacher_tap.recording() as teacher_features, torch.no_grad():
            teacher_output = self.teacher(*inputs, **keywords)
        with self.student_tap.recording() as student_features:
            student_output = self.student(*inputs, **keywords)
        return student_output, teacher_output, self.compare(student_features, teacher_features)

    def compare(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the layers' losses from features by name, as ``FeatureTap.recording`` gives them."""
        total = 0.0
        for student_name, teacher_name in self.layers.items():
            try:
                loss = self.loss(student[student_name], teacher[teacher_name])
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"student layer {student_name!r} with teacher layer {teacher_name!r}: {error}"
                ) from error
            total = total + self.weights.get(student_name, 1.0) * loss
        return total

    def close(self) -> None:
        """Remove the hooks from both networks."""
        self.student_tap.close()
        self.teacher_tap.close()

    def extra_repr(self) -> str:
        return f"layers={self.layers}" + (f", weights={self.weights}" if self.weights else "")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's and the data-parallel wrappers."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and type(network).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = network.module
        if inner is None:
            return network
        network = inner
