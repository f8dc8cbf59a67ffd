"""Features of named layers, recorded by forward hooks."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .arguments import check_type
from .structures import Keys, describe, element, parse_path


class _Recorder:
    """The part of a tap that its hooks refer to, so that the tap can be garbage-collected before the network.

    The hooks then remove themselves in the next pass: ``__del__`` might run while a module iterates over them.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.features: dict[str, Tensor] = {}
        self.is_active = self.is_closed = self.is_dropped = False
        self.thread = 0  # that of the recording
        self.handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and files: without features, and idle."""
        return {**self.__dict__, "features": {}, "is_active": False}

    def record(self, name: str, keys: Keys, module: nn.Module, inputs: Any, output: Any) -> None:
        """Record the output of a module, or an element of it, while recording."""
        if not self.is_active:
            if self.is_dropped and not torch.compiler.is_compiling():
                self.remove_hooks()
            return
        if not torch.compiler.is_compiling() and threading.get_ident() != self.thread:
            return  # a pass of the same network in another thread
        try:
            feature = element(output, keys)
        except LookupError as error:
            raise ValueError(f"{self.role} layer {name!r}: {error}") from error
        if not isinstance(feature, Tensor):
            key = next(iter(feature), 0) if isinstance(feature, Mapping) else 0
            raise TypeError(
                f"{self.role} module {name!r} returned a {describe(feature)}: tap a module that returns a tensor, or "
                f"name an element or field that is one, such as '{name}[{key}]'"
            )
        if name in self.features:
            raise RuntimeError(
                f"{self.role} module {name!r} ran more than once in one pass, so its features are ambiguous: "
                "tap a module that runs once, such as an nn.Identity() behind one of the calls"
            )
        self.features[name] = feature.clone()

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.is_closed = True


class FeatureTap:
    """Forward hooks that record the outputs of named modules inside ``recording()``.

    Features are cloned, because an in-place activation after the tapped module may overwrite them (the LeakyReLU of
    the public U-Net's next block does). Create the tap before the first pass of a network that torch.compile wraps:
    compiled code ignores later hooks, and ``recording()`` then raises. The hooks last until ``close()``, or until the
    first pass after the tap was garbage-collected.

    A recording ignores the passes of other threads, which may run the same network, such as a shared teacher.

    A copy of a tapped network, by ``copy.deepcopy`` or ``torch.save``, has an idle tap of its own, which
    ``remove_hooks`` removes. A copy of the network together with the tap, as in a copied distiller, works like the
    original.

    Args:
        network: any module, or one that a wrapper contains: see ``named_layers``.
        names: names of its submodules, as in ``named_modules()``. Where a module returns a tuple, a dict or an object
            with fields, a name ends in the index or field of a tensor: ``"down_blocks.0[0]"``, ``"encoder[sample]"``.
            Without the name of a module, it is an element of the network's own output: ``"[hidden_states][2]"``.
        role: how error messages call the network.

    Raises:
        TypeError: ``network`` is not a module, a module is part of a TorchScript module, or ``names`` is a string.
        ValueError: a name is not that of a submodule (the message lists the nearest names), a submodule never runs, or
            the network is a DataParallel of several GPUs.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], role: str = "network") -> None:
        self._recorder = _Recorder(role)
        check_type(f"the {role}", network, nn.Module, "a torch.nn.Module")
        if isinstance(names, str):
            raise TypeError(f"names={names!r}: expected a list of the {role}'s module names, such as [{names!r}]")
        if isinstance(network, DataParallel) and len(network.device_ids) > 1:
            raise ValueError(
                f"the {role} is a DataParallel of {len(network.device_ids)} GPUs, which runs a copy of it on each: "
                "their features cannot be tapped. Use DistributedDataParallel, or one GPU with device_ids=[0]"
            )
        self.names: list[str] = list(names)
        modules = named_layers(network)
        paths: dict[str, tuple[str, Keys]] = {}
        for name in names:
            paths[name] = (name, ()) if name in modules or not isinstance(name, str) else parse_path(name)
            module_name = paths[name][0]
            if isinstance(module_name, str):
                _check_not_scripted(modules, module_name, role)
            if module_name not in modules or not (module_name or paths[name][1]):
                nearest = difflib.get_close_matches(
                    str(module_name), [other for other in modules if other], 5, cutoff=0
                )
                raise ValueError(
                    f"the {role} has no module named {module_name!r}; "
                    + (f"the nearest names are {', '.join(map(repr, nearest))}" if nearest else "it has no modules")
                )
            if reason := _never_runs(modules, module_name):
                raise ValueError(f"{role} layer {name!r} would not run: {reason}")
        # bound methods: a copy of the network then refers to the copy of the recorder
        self._recorder.handles = [
            modules[module_name].register_forward_hook(partial(self._recorder.record, name, keys))
            for name, (module_name, keys) in paths.items()
        ]

    def __del__(self) -> None:
        self._recorder.is_dropped = True

    @contextmanager
    def recording(self, enabled: bool = True) -> Iterator[dict[str, Tensor]]:
        """Record one forward pass: ``with tap.recording() as features: network(images)``.

        Args:
            enabled: if False, nothing is recorded.

        Yields:
            A dict that contains the features by module name after the pass.

        Raises:
            RuntimeError: a tapped module did not run, or ran twice, in the pass; the tap is closed, or is recording
                another pass.
            TypeError: a tapped module returned no tensor.
            ValueError: the output of a tapped module has no element or field of that name.
        """
        recorder = self._recorder
        if enabled and recorder.is_closed:
            raise RuntimeError(
                f"the hooks on the {recorder.role} were removed by close(): create a new tap or distiller"
            )
        if recorder.is_active:  # in another thread, or around this one: it would record the features of both passes
            raise RuntimeError(
                f"the tap of the {recorder.role} is recording another pass: run one after the other, or give each "
                "thread a copy made with copy.deepcopy"
            )
        features: dict[str, Tensor] = {}
        recorder.features, recorder.is_active = features, enabled
        if not torch.compiler.is_compiling():
            recorder.thread = threading.get_ident()
        try:
            yield features
        finally:
            recorder.features, recorder.is_active = {}, False  # a reference would keep the graph of the pass alive
        missing = [name for name in self.names if name not in features]
        if enabled and missing:
            raise RuntimeError(
                f"{recorder.role} layers {missing} did not run in this pass: run the network inside the recording, tap "
                "layers that its forward uses, and create the tap before torch.compile, but after layers are replaced, "
                "for example by convert_sync_batchnorm"
            )

    def close(self) -> None:
        """Remove the hooks."""
        self._recorder.remove_hooks()


def _check_not_scripted(modules: Mapping[str, nn.Module], name: str, role: str) -> None:
    """Raise a TypeError for a module of a TorchScript network, whose compiled code runs without Python's hooks."""
    scripted = [outer for outer in _outer_names(name) if isinstance(modules.get(outer), torch.jit.ScriptModule)]
    # a traced module as a whole has hooks
    if scripted and (scripted[0] != name or isinstance(modules[name], torch.jit.RecursiveScriptModule)):
        whole = f"module {scripted[0]!r} of the {role}" if scripted[0] else f"the {role}"
        raise TypeError(
            f"{whole} is a TorchScript module, whose layers cannot be tapped: expected the nn.Module that it was made "
            "from. Without it, compute the features in your own code and pass them to SRPLoss"
        )


def _never_runs(modules: Mapping[str, nn.Module], name: str) -> str:
    """Return why a network never calls its module of this name and what to tap instead, or ""."""
    module, network = modules[name], modules[""]
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward:
        entries = [f"{name}.{key}" for key, _ in module.named_children()]
        return f"it is a {type(module).__name__}, which only holds modules: tap one of {entries[:5]}"
    if name and isinstance(network, torch.fx.GraphModule):
        called = [node.target for node in network.graph.nodes if node.op == "call_module"]
        if not any(outer in called for outer in _outer_names(name)):
            return (
                "a traced or exported network calls only the modules that are nodes of its graph: tap the original "
                "network, or for an exported one that of torch.export.unflatten"
            )
    return ""


def _outer_names(name: str) -> list[str]:
    """Return the names of the modules that contain a module, from the network to the module itself."""
    return ["", *accumulate(name.split("."), "{}.{}".format)] if name else [""]


# where torch.compile, FullyShardedDataParallel and checkpoint_wrapper keep the module that they wrap
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def named_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a network by name, including the names that they have without wrappers.

    Wrappers are those of torch.compile, data-parallel training and activation checkpointing, around the network or
    around its layers, and others that have the network as ``module``: AveragedModel, DeepSpeed, Lightning Fabric. A
    name that a layer shares with its wrapper is that of the wrapper.
    """
    network = unwrap(network)
    modules = dict(network.named_modules(remove_duplicate=False))  # a shared module has several names
    for name, module in list(modules.items()):
        modules.setdefault(".".join(part for part in name.split(".") if part not in WRAPPED), module)
    inner = getattr(network, "module", None)
    return {**named_layers(inner), **modules} if isinstance(inner, nn.Module) else modules


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of torch.compile and data-parallel training."""
    while True:
        if isinstance(network, DataParallel | DistributedDataParallel):
            network = network.module
        elif (compiled := dict(network.named_children()).get("_orig_mod")) is not None:
            network = compiled
        else:
            return network


def remove_hooks(network: nn.Module) -> None:
    """Remove all forward hooks, such as the feature taps that a copy of a tapped network inherits."""
    for module in network.modules():
        module._forward_hooks.clear()
