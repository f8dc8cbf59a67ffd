"""A training step on inputs that stay where they are, which one CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import distributed
from .datasets import has_one_size
from .options import ResolvedConfig

Tensors = Mapping[str, Tensor]
WARMUP_STEPS = 3  # steps before the capture: they allocate optimizer states, select algorithms and compile kernels


class StaticStep:
    """A step that copies its inputs into tensors of its own; on a GPU, one CUDA graph after a warm-up.

    The warm-up consists of steps like all others, and the capture itself computes nothing, so that the results are
    those of the step without a graph. Before the capture, a batch of more images than the first one decides the shapes;
    inputs of other shapes run without the graph.

    Args:
        step: function of tensors by name that returns tensors by name. It must not wait for the device, and must change
            what it keeps from step to step in place.
        device: where the inputs are.
        references: function that returns a function which assigns again what the last step assigned. A replay assigns
            nothing: after a step without the graph, what it computes would not be found.
    """

    def __init__(
        self,
        step: Callable[[Tensors], dict[str, Tensor]],
        device: torch.device,
        references: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        self._step, self._device, self._references = step, device, references
        self._assign: Callable[[], None] | None = None  # what the capture assigned
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # of the warm-up and the capture
        self._steps, self._has_warned = 0, False

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """Take a step. The next one overwrites what this one returns.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        more = any(len(inputs[name]) > len(value) for name, value in self._inputs.items())
        if not self._inputs or (more and self._graph is None):  # a run may be resumed at a short last batch
            self._inputs = {name: torch.empty_like(value) for name, value in inputs.items()}
            self._steps = 0
        if any(inputs[name].shape != value.shape for name, value in self._inputs.items()):
            if not self._has_warned:
                distributed.print_rank0("cuda_graph: steps on images of another size than the first run without it")
                self._has_warned = True
            return self._step(inputs)
        for name, value in self._inputs.items():
            value.copy_(inputs[name], non_blocking=True)
        self._steps += 1
        if self._device.type != "cuda":
            return self._step(self._inputs)
        if self._steps <= WARMUP_STEPS:
            return self._warm_up()
        if self._graph is None:
            self._capture()
        assert self._graph
        self._graph.replay()
        if self._assign:
            self._assign()
        return self._outputs

    def _warm_up(self) -> dict[str, Tensor]:
        """Take a step in the stream of the capture, because work of the default stream cannot be captured."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            outputs = self._step(self._inputs)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return outputs

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local", because the data loader's thread allocates pinned memory meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self._step(self._inputs)
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be captured as a CUDA graph: {error}\nResume the run without --cuda_graph"
            ) from error
        self._graph = graph
        self._assign = self._references() if self._references else None


def uncapturable_reason(config: ResolvedConfig) -> str:
    """Return why the steps of a stage cannot be a CUDA graph, in words, or ""."""
    if config.torch_device.type != "cuda":
        return f"the device is {config.torch_device}, not a GPU"
    if distributed.world_size() > 1:
        return "the run has several processes"
    if not has_one_size(config):
        return f"--preprocess {config.preprocess} gives images of different sizes"
    return ""
