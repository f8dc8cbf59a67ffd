"""The semantic relation preserving loss: ``relation_loss``, and ``SRPLoss``, the same as a module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .arguments import check_number
from .kernels import DISTANCES, NORMALIZATIONS, Relation, dispatch, reference, relation_loss_op

LAYOUTS = ("nchw", "nlc")
SCOPES = ("image", "batch", "global")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: str = "row",
    distance: str = "l1",
    delta: float = 1.0,
    reduction: str = "mean",
    layout: str = "nchw",
    eps: float = 1e-12,
    backend: str = "auto",
    scope: str = "image",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """How much the relations between a student's pixels differ from those between its teacher's.

    With features q_i of the N pixels of an image, G_ij = q_i . q_j and the relation matrix A that ``normalize``
    names, an image's loss is the mean over its N^2 pairs of rho(A_student - A_teacher). No N x N array is held
    (but by ``backend="reference"``). After Li, Jiang and Aarabi, *Semantic Relation Preserving Knowledge
    Distillation for Image-to-Image Translation*, ECCV 2020.

    Args:
        student: features (B, C_s, H, W), or (B, N, C_s) with ``layout="nlc"``; float64, float32, bfloat16 or float16.
            Any strides: NCHW and channels_last are read in place.
        teacher: features (B, C_t, H, W) or (B, N, C_t) without a gradient. C_t may differ from C_s.
        normalize: ``"row"`` A_ij = G_ij / ||G_i,:||, ``"cosine"`` A_ij = G_ij / (||q_i|| ||q_j||), ``"none"`` A = G.
        distance: rho: ``"l1"`` abs(d), ``"l2"`` d^2, ``"huber"`` d^2/2 up to delta and linear from there.
        delta: where Huber's distance turns linear, > 0.
        reduction: what becomes of the B images' values: their ``"mean"``, their ``"sum"``, or ``"none"``: all (B,).
        layout: ``"nchw"`` or ``"nlc"``.
        eps: a pixel whose norm (cosine) or row norm (row) is at most eps has relation 0 to everything, and gets no
            gradient through its own normalisation.
        backend: ``"auto"``, or one of ``srpkd.kernels.BACKENDS``; with "auto" the environment variable
            SRPKD_BACKEND, where set, decides.
        scope: which pixels are related: those of each ``"image"``; those of all images in the ``"batch"``, as if they
            were one image of B N pixels; or ``"global"``, those of the batches of all ranks of a process group (the
            batch's, where torch.distributed is not initialised). For ``distance="l2"`` the ranks then exchange C x C
            matrices alone, else their features, around the ring of ranks. The loss is the same on every rank, and its
            gradient the one that DistributedDataParallel, which averages over the ranks, makes exact.
        group: the process group of ``scope="global"``; the default one if None.

    Returns:
        A scalar, or (B,) with ``reduction="none"``, (1,) unless scope is "image": float64 for float64 features, else
        float32.

    Raises:
        TypeError: the features are no dense tensors of one of the four dtypes, or delta or eps is no number.
        ValueError: shapes, devices or options that do not fit, or a teacher that requires a gradient.
        srpkd.kernels.BackendUnavailable: a backend asked for by name cannot run here.
    """
    _check_options(normalize, distance, delta, reduction, layout, eps, scope)
    _check_features(student, teacher, layout)
    if layout == "nchw":
        student, teacher = (features.flatten(2).transpose(1, 2) for features in (student, teacher))
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)

    if scope != "image":
        student, teacher = (features.reshape(1, -1, features.shape[2]) for features in (student, teacher))

    backend = dispatch.requested_backend(backend)
    if scope == "global" and _ranks(group) > 1:
        from .kernels import distributed  # here, as it takes a second to import torch's compiler

        choices = distributed.BACKENDS[distance]
        dispatch.check_choice(
            f"with scope='global', several ranks and distance={distance!r}, backend", backend, choices
        )
        loss = distributed.relation_loss(student, teacher, Relation(normalize, distance, delta, eps), group)
    elif backend == "reference":
        loss = reference.relation_loss(student, teacher, Relation(normalize, distance, delta, eps))
    else:
        need_grad = student.requires_grad and torch.is_grad_enabled()
        loss, _ = relation_loss_op(student, teacher, normalize, distance, float(delta), float(eps), backend, need_grad)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


class SRPLoss(nn.Module):
    """``relation_loss`` with its options kept: ``SRPLoss()(student_features, teacher_features)``.

    Options, shapes and errors are those of :func:`relation_loss`; wrong options raise here already.
    """

    def __init__(
        self,
        normalize: str = "row",
        distance: str = "l1",
        delta: float = 1.0,
        reduction: str = "mean",
        layout: str = "nchw",
        eps: float = 1e-12,
        backend: str = "auto",
        scope: str = "image",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(normalize, distance, delta, reduction, layout, eps, scope)
        dispatch.requested_backend(backend)
        self.options = {
            "normalize": normalize,
            "distance": distance,
            "delta": delta,
            "reduction": reduction,
            "layout": layout,
            "eps": eps,
            "backend": backend,
            "scope": scope,
        }
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Features (B, C_s, H, W) and (B, C_t, H, W), or (B, N, C) with ``layout="nlc"``, -> the loss."""
        return relation_loss(student, teacher, group=self.group, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _check_options(
    normalize: str, distance: str, delta: float, reduction: str, layout: str, eps: float, scope: str
) -> None:
    dispatch.check_choice("normalize", normalize, NORMALIZATIONS)
    dispatch.check_choice("distance", distance, DISTANCES)
    dispatch.check_choice("reduction", reduction, REDUCTIONS)
    dispatch.check_choice("layout", layout, LAYOUTS)
    dispatch.check_choice("scope", scope, SCOPES)
    check_number("delta", delta, above=0)
    check_number("eps", eps, least=0)


def _check_features(student: Tensor, teacher: Tensor, layout: str) -> None:
    expected = "(B, C, H, W)" if layout == "nchw" else "(B, N, C)"
    for name, features in (("student", student), ("teacher", teacher)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} features: expected a tensor {expected}, received {type(features).__name__}")
        if features.layout is not torch.strided or features.is_nested:
            raise TypeError(f"{name} features are sparse, nested or packed: expected a dense tensor, as by .to_dense()")
        if features.dtype not in DTYPES:
            raise TypeError(
                f"{name} features are {features.dtype}; expected float64, float32, bfloat16 or float16: "
                "convert them, for example by .float()"
            )
        if features.ndim != len(expected.split(",")):
            other = {("nchw", 3): "nlc", ("nlc", 4): "nchw"}.get((layout, features.ndim))
            raise ValueError(
                f"{name} features have shape {tuple(features.shape)}; layout={layout!r} expects {expected}"
                + (f". For this shape use layout={other!r}" if other else "")
            )
        if features.numel() == 0:
            raise ValueError(f"{name} features are empty: shape {tuple(features.shape)}")
    pixels = slice(2, None) if layout == "nchw" else slice(1, 2)
    if student.shape[0] != teacher.shape[0] or student.shape[pixels] != teacher.shape[pixels]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} may differ in C alone, and differ in "
            + (
                "the batch"
                if student.shape[0] != teacher.shape[0]
                else "their pixels: tap layers of equal size, "
                "or resize one of the two, for example by torch.nn.functional.interpolate"
            )
        )
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device} and teacher on {teacher.device}: move them to one device")
    if teacher.requires_grad:
        raise ValueError(
            "teacher features require a gradient, and the teacher is not trained here: "
            "run it under torch.no_grad(), or pass teacher.detach()"
        )
