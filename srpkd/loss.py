"""The semantic relation preserving loss: ``relation_loss``, and ``SRPLoss``, the same as a module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .arguments import check_choice, check_flag, check_number, check_type, check_whole
from .kernels import DISTANCES, NORMALIZATIONS, Relation, dispatch, native, python_relation_loss, reference, sampling
from .kernels.formulas import DEFAULT_DISTANCE, DEFAULT_NORMALIZE, DTYPES, Distance, Normalize, reduced
from .kernels.op import check_transforms
from .layouts import (
    LAYOUTS,
    NDIM,
    SHAPES,
    Layout,
    channel_dim,
    check_dense,
    check_dimensions,
    likely_layout,
    pixel_count,
    warn_if_unlikely,
)

Scope = Literal["image", "batch", "global"]
Reduction = Literal["mean", "sum", "none"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
ONE_PIXEL = (
    "of shape {} have one pixel for each image, which has no relations: the loss is 0 and trains nothing. Tap a layer "
    "before the pixels are pooled, or relate the images of the batch with scope='batch'"
)
CHOICES: dict[str, tuple[str, ...]] = {
    "normalize": NORMALIZATIONS, "distance": DISTANCES, "reduction": REDUCTIONS, "layout": LAYOUTS, "scope": SCOPES,
}  # fmt: skip


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: Normalize = DEFAULT_NORMALIZE,
    distance: Distance = DEFAULT_DISTANCE,
    delta: float = 1.0,
    reduction: Reduction = "mean",
    layout: Layout = "nchw",
    eps: float = 1e-12,
    backend: str = "auto",
    scope: Scope = "image",
    group: dist.ProcessGroup | None = None,
    rectify: bool = False,
    detach_norms: bool = False,
    columns: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the distance between the relation matrices of a student's and a teacher's features.

    With features q_i of the N pixels of an image, G_ij = q_i . q_j and the relation matrix A that ``normalize``
    selects, the loss of an image is the mean over its N^2 pairs of rho(A_student - A_teacher). N x N arrays are
    stored by ``backend="reference"``, and by others only where they are small. After Li, Jiang and Aarabi, *Semantic
    Relation Preserving Knowledge Distillation for Image-to-Image Translation*, ECCV 2020; ``normalize="row"`` is the
    paper's row-normalised matrix.

    Args:
        student: features (B, C_s, H, W), tokens (B, N, C_s) with ``layout="nlc"``, or (B, H, W, C_s) with
            ``layout="nhwc"``; float64, float32, bfloat16 or float16. Any strides: NCHW and channels_last are read in
            place. Features without a batch, such as (C_s, H, W), are a batch of one.
        teacher: features of the same layout without a gradient. Their number of channels C_t may differ from C_s.
        normalize: ``"cosine"`` (default) A_ij = G_ij / (||q_i|| ||q_j||), ``"row"`` A_ij = G_ij / ||G_i,:||, or
            ``"none"`` A = G.
        distance: rho: ``"l2"`` (default) d^2, ``"l1"`` abs(d), or ``"huber"`` d^2/2 up to delta and linear beyond.
        delta: where the Huber distance becomes linear, > 0; other distances ignore it.
        reduction: ``"mean"`` or ``"sum"`` over the B images, or ``"none"``: the loss of each image.
        layout: ``"nchw"``, ``"nlc"`` or ``"nhwc"``. A shape that looks like another layout gives a warning.
        eps: a pixel whose norm (cosine) or row norm (row) is at most eps has relation 0 to all pixels, and no gradient
            through its own normalisation. ``normalize="none"`` ignores it.
        backend: ``"auto"``, or one of ``srpkd.kernels.BACKENDS``. The environment variable SRPKD_BACKEND, if set,
            replaces "auto".
        scope: which pixels are related: those of each ``"image"``; those of all images of the ``"batch"``, as if they
            were one image of B N pixels; or ``"global"``, those of the batches of all ranks of a process group (the
            batch of this process if torch.distributed is not initialised). For ``distance="l2"`` without ``rectify``,
            the ranks exchange only C x C matrices; otherwise, and for few pixels, their features, around the ring of
            ranks. The loss is the same on every rank. Its gradient is exact under DistributedDataParallel, which
            averages over the ranks.
        group: the process group of ``scope="global"``, to which this process belongs; the default group if None.
        rectify: negative entries of both relation matrices count as 0: max(A, 0) replaces A before the distance, as in
            Gram anchoring (DINOv3). The gradient is 0 where A_student <= 0, as through ``torch.relu``.
        detach_norms: the norms (cosine) or row norms (row) are constants to the gradient, as in the pairwise loss of
            structured knowledge distillation (Liu et al., CVPR 2019). The value is the same; ``normalize="none"`` has
            no norms and ignores it.
        columns: m, to relate every pixel to m random pixels instead of all N, in O(N m C) time: an unbiased estimate
            of the loss and of its gradient. Each call draws other pixels. The loss is exact if that takes no longer:
            for up to 256 pixels, from m = N/3 on, for ``distance="l2"`` with few channels or many columns, and
            for ``normalize="row"`` with no more pixels than channels. Needs backend "auto", "blocked" or, on a CPU,
            "native", and one process if scope is "global".
        generator: the random generator of the columns, on the device of the features; torch's default generator if
            None.

    Returns:
        A scalar, or (B,) with ``reduction="none"``: (1,) unless scope is "image", and () for features without a batch.
        float64 for float64 features, else float32.

    Raises:
        TypeError: the features are not dense tensors of one of the four dtypes, or an option has the wrong type.
        ValueError: shapes, devices or options do not fit, the teacher requires a gradient, or the named backend does
            not support these options.
        BackendUnavailable: the named backend cannot run here.
        NotImplementedError: under forward-mode differentiation, torch.func.grad, vjp or jacrev, unless the backend is
            "reference"; or SRPKD_CUDA_KERNEL names a kernel that does not cover this loss.
        RuntimeError: in a double backward, unless the backend is "reference"; or the build of backend "native", which
            happens at its first use, fails.
    """
    for name, value in (
        ("normalize", normalize),
        ("distance", distance),
        ("delta", delta),
        ("reduction", reduction),
        ("layout", layout),
        ("eps", eps),
        ("backend", backend),
        ("scope", scope),
        ("group", group),
        ("rectify", rectify),
        ("detach_norms", detach_norms),
        ("columns", columns),
        ("generator", generator),
    ):
        _check_option(name, value)
    _check_combination(scope, group, columns, generator)
    _check_features(student, teacher, layout, scope, group)
    if not torch.compiler.is_compiling():
        warn_if_unlikely(student, teacher, (layout, layout))
    relation = Relation(normalize, distance, float(delta), float(eps), rectify, detach_norms)
    return _relation_loss(student, teacher, relation, reduction, layout, backend, scope, group, columns, generator)


class SRPLoss(nn.Module):
    """``relation_loss`` with fixed options: ``SRPLoss()(student_features, teacher_features)``.

    Options, shapes and errors are those of ``relation_loss``. The default is the cosine matrix with the l2
    distance; ``SRPLoss(normalize="row")`` compares the paper's row-normalised matrices. The options are attributes of
    the same names and are validated when they are set.
    """

    has_warned: bool = False  # about the shape of features: once is enough

    def __init__(
        self,
        normalize: Normalize = DEFAULT_NORMALIZE,
        distance: Distance = DEFAULT_DISTANCE,
        delta: float = 1.0,
        reduction: Reduction = "mean",
        layout: Layout = "nchw",
        eps: float = 1e-12,
        backend: str = "auto",
        scope: Scope = "image",
        group: dist.ProcessGroup | None = None,
        rectify: bool = False,
        detach_norms: bool = False,
        columns: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_combination(scope, group, columns, generator)
        self.normalize, self.distance, self.delta = normalize, distance, delta
        self.reduction, self.layout, self.eps = reduction, layout, eps
        self.backend, self.scope, self.group = backend, scope, group
        self.rectify, self.detach_norms = rectify, detach_norms
        self.columns, self.generator = columns, generator

    def __setattr__(self, name: str, value: Any) -> None:
        _check_option(name, value)
        super().__setattr__(name, value)

    if TYPE_CHECKING:  # the type of a module's call is Any

        def __call__(self, student: Tensor, teacher: Tensor) -> Tensor: ...

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of features (B, C_s, H, W) and (B, C_t, H, W), or those of another ``layout``."""
        _check_features(student, teacher, self.layout, self.scope, self.group)
        if not (torch.compiler.is_compiling() or self.has_warned):
            if warn_if_unlikely(student, teacher, (self.layout, self.layout)):
                self.has_warned = True
            elif student.requires_grad and torch.is_grad_enabled() and is_constant(self, student.shape, self.layout):
                warnings.warn(f"student features {ONE_PIXEL.format(tuple(student.shape))}", stacklevel=4)
                self.has_warned = True
        relation = Relation(
            self.normalize, self.distance, float(self.delta), float(self.eps), self.rectify, self.detach_norms
        )
        options = self.reduction, self.layout, self.backend, self.scope, self.group, self.columns, self.generator
        return _relation_loss(student, teacher, relation, *options)

    def __deepcopy__(self, memo: dict[int, Any]) -> SRPLoss:
        memo[id(self.group)] = self.group  # a handle of this process, which cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        names = ["normalize", "distance", "delta", "reduction", "layout", "eps", "backend", "scope", "columns"]
        names += ["rectify", "detach_norms"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def is_constant(loss: SRPLoss, shape: Sequence[int], layout: Layout) -> bool:
    """Return whether a loss is 0 because images have one pixel, which is related only to itself.

    Args:
        shape: shape of the student's features.
        layout: layout of the features.
    """
    if len(shape) < NDIM[layout] - 1 or pixel_count(shape, layout) != 1:
        return False
    return loss.scope == "image" and loss.normalize != "none"


def _relation_loss(
    student: Tensor,
    teacher: Tensor,
    relation: Relation,
    reduction: Reduction,
    layout: Layout,
    backend: str,
    scope: Scope,
    group: dist.ProcessGroup | None,
    columns: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """``relation_loss`` with options and features that have been validated."""
    is_global = _is_global(scope, group)
    if is_global:
        from .kernels import distributed  # here, since it takes a second to import torch's compiler

        backend = distributed.check_on_ranks(group, _global_backend, backend, relation, student.device, columns)
    else:
        backend = dispatch.requested_backend(backend)
    if columns is not None:
        dispatch.check_samples_columns(backend, student.device)
        _, pixels, channels = _sizes(student, teacher, layout, scope)
        exact = sampling.exact_backend(backend, relation, student.device, pixels, channels, columns)
        backend, columns = (backend, columns) if exact is None else (exact, None)
    if backend != "reference":
        check_transforms(student, teacher)
    # torch.compile could not trace the choice by the sizes: python_relation_loss chooses when it runs
    if not (is_global or columns is not None or torch.compiler.is_compiling()):
        method = _native_method(student, teacher, relation, layout, backend, scope)
        if method is not None:
            return native.relation_loss(student, teacher, relation, reduction, layout, scope, method)

    is_batch = student.ndim == NDIM[layout]
    if not is_batch:
        student, teacher = student.unsqueeze(0), teacher.unsqueeze(0)
    if backend == "reference":
        # autograd makes the gradient of a slice contiguous, as that of other backends: PyTorch's batch norms on a CPU,
        # also those in nn.InstanceNorm2d, misread that of one image with other strides (seen in 2.14)
        student = student.narrow(0, 0, student.shape[0])
    if layout == "nchw":
        student, teacher = (features.flatten(2).transpose(1, 2) for features in (student, teacher))
    elif layout == "nhwc":
        student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)

    if scope != "image":
        student, teacher = (features.reshape(1, -1, features.shape[2]) for features in (student, teacher))

    if is_global:
        loss = reduced(distributed.relation_loss(student, teacher, relation, group, backend), reduction)
    elif backend == "reference":
        loss = reduced(reference.relation_loss(student, teacher, relation), reduction)
    else:
        index = None
        if columns is not None:
            batch, pixels, _ = student.shape
            index = sampling.draw_columns(batch, pixels, columns, student.device, generator)
        loss = python_relation_loss(student, teacher, relation, backend, reduction, index)
    return loss.squeeze(0) if reduction == "none" and not is_batch else loss


def _native_method(
    student: Tensor, teacher: Tensor, relation: Relation, layout: Layout, backend: str, scope: Scope
) -> str | None:
    """Return the method by which the C++ operator computes the loss of these features, or None if it does not."""
    if backend not in ("auto", "native", "closed_form"):
        return None
    batch, pixels, channels = _sizes(student, teacher, layout, scope)
    if any(isinstance(size, torch.SymInt) for size in (batch, pixels, *channels)):
        return None  # make_fx traces for any sizes: python_relation_loss chooses when it runs
    dtype = student.dtype if student.dtype == teacher.dtype else torch.promote_types(student.dtype, teacher.dtype)
    need_grad = student.requires_grad and torch.is_grad_enabled()
    name = dispatch.resolve_backend(backend, student.device, relation, dtype, pixels, channels, batch, need_grad)
    if name == "closed_form" and student.device.type == "cuda":
        kernels = dispatch.backend_module(name).implementation(student.device, dtype, relation)
        return "closed_form" if kernels == "native" else None
    return "tiles" if name == "native" else None


def _sizes(student: Tensor, teacher: Tensor, layout: Layout, scope: Scope) -> tuple[int, int, tuple[int, int]]:
    """Return B, N, and C_s and C_t; B is 1 unless ``scope`` is "image"."""
    ours, channel = student.shape, channel_dim(layout)
    pixels = pixel_count(ours, layout)
    batch = ours[0] if len(ours) == NDIM[layout] else 1
    if scope != "image":
        pixels, batch = pixels * batch, 1
    return batch, pixels, (ours[channel], teacher.shape[channel])


def _check_combination(
    scope: Scope, group: dist.ProcessGroup | None, columns: int | None, generator: torch.Generator | None
) -> None:
    """Raise a ValueError for an option that has no effect without another."""
    if generator is not None and columns is None:
        raise ValueError("generator draws the sampled columns: give columns, their number, or leave out generator")
    if group is not None and scope != "global":
        raise ValueError(f"group is that of scope='global', received scope={scope!r}: change scope, or leave out group")


def _is_global(scope: Scope, group: dist.ProcessGroup | None) -> bool:
    """Return whether the pixels of several processes are related."""
    if scope != "global" or not (dist.is_available() and dist.is_initialized()):
        return False
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group does not contain this process: call the loss only in the processes of its group")
    return size > 1


def _global_backend(backend: str, relation: Relation, device: torch.device, columns: int | None) -> str:
    """Return the requested backend, if this rank can take part in a loss of several ranks."""
    from .kernels import distributed

    if columns is not None:
        raise ValueError(f"columns={columns} with scope='global' works in one process only: leave out columns")
    backend = dispatch.requested_backend(backend)
    distributed.check_backend(backend, relation, device)
    return backend


def _check_option(name: str, value: Any) -> None:
    """Raise the error of ``relation_loss`` for a wrong value of an option; accept any other name."""
    if name == "group" and value is not None and dist.is_available():
        # new_group returns NON_GROUP_MEMBER, an int, in the processes that do not belong to it
        check_type(name, value, (dist.ProcessGroup, int), "a torch.distributed.ProcessGroup or None")
    elif name == "layout" and isinstance(value, list | tuple):
        raise ValueError(f"layout={value!r}: expected one of {LAYOUTS}; RelationDistiller takes a pair of layouts")
    elif name in CHOICES:
        check_choice(name, value, CHOICES[name])
    elif name == "backend":
        dispatch.requested_backend(value)
    elif name == "columns" and value is not None:
        check_whole(name, value, least=1)
    elif name == "generator" and value is not None:
        check_type(name, value, torch.Generator, "a torch.Generator or None")
    elif name == "delta":
        check_number(name, value, above=0)
    elif name == "eps":
        check_number(name, value, least=0)
    elif name in ("rectify", "detach_norms"):
        check_flag(name, value)


def _check_features(
    student: Tensor, teacher: Tensor, layout: Layout, scope: Scope, group: dist.ProcessGroup | None
) -> None:
    if _is_global(scope, group):
        from .kernels import distributed

        distributed.check_on_ranks(group, _check_own_features, student, teacher, layout)
    else:
        _check_own_features(student, teacher, layout)


def _check_own_features(student: Tensor, teacher: Tensor, layout: Layout) -> None:
    for name, features in (("student", student), ("teacher", teacher)):
        if not isinstance(features, Tensor):
            raise TypeError(
                f"{name} features: expected a tensor {SHAPES[layout][0]}, received {type(features).__name__}"
                + (": add the losses of its tensors" if isinstance(features, list | tuple) else "")
            )
        check_dense(name, features)
        if features.dtype not in DTYPES:
            raise TypeError(
                f"{name} features are {features.dtype}: expected float64, float32, bfloat16 or float16; "
                "convert them, for example with .float()"
            )
        if features.numel() == 0:
            raise ValueError(f"{name} features are empty: shape {tuple(features.shape)}")
    check_dimensions(student, teacher, (layout, layout))
    _check_sizes(student, teacher, layout)
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}: move them to one device")
    if teacher.requires_grad:
        raise ValueError(
            "teacher features require a gradient, but the teacher is not trained here: "
            "run it under torch.no_grad(), or pass teacher.detach()"
        )


def _check_sizes(student: Tensor, teacher: Tensor, layout: Layout) -> None:
    """Raise a ValueError unless the features have the same batch and the same pixels."""
    if _equal_but_for_channels(student, teacher, layout):
        return
    is_batch = student.ndim == NDIM[layout]
    if student.ndim != teacher.ndim or (is_batch and student.shape[0] != teacher.shape[0]):
        reason = "in the batch"
    elif layout == "nlc":
        reason = "in their tokens: tap layers of equal size, and leave out class tokens with features[:, 1:]"
        if student.shape[-1] == teacher.shape[-2] or student.shape[-2] == teacher.shape[-1]:
            reason += "; if one of them is (B, C, N), transpose it with features.mT"
        elif student.shape[-1] == teacher.shape[-1]:
            reason += "; if both are (B, C, N), transpose them with features.mT"
    else:
        reason = "in their pixels: tap layers of equal size, or resize one with torch.nn.functional.interpolate"
    if layout == "nchw" and not is_batch:
        reason += "; for tokens (B, N, C) use layout='nlc'"
    other: Layout = "nhwc" if layout == "nchw" else "nchw"
    if layout != "nlc" and is_batch and _equal_but_for_channels(student, teacher, other):
        reason += f"; for maps {SHAPES[other][0]} use layout={other!r}"
    elif len(likely := {likely_layout(features, layout) for features in (student, teacher)}) == 2 and is_batch:
        reason += (
            f"; one of them looks like {SHAPES[next(filter(None, likely))][0]}: permute it, or give RelationDistiller "
            "the layouts of both networks"
        )
    raise ValueError(
        f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} may differ only in C, but differ {reason}"
    )


def _equal_but_for_channels(student: Tensor, teacher: Tensor, layout: Layout) -> bool:
    sizes = [list(features.shape) for features in (student, teacher)]
    for size in sizes:
        del size[channel_dim(layout)]
    return sizes[0] == sizes[1]
