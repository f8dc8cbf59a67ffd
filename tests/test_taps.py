"""Features of named layers, and copies of tapped networks."""

from __future__ import annotations

import re
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tapped import COPIES, hooks, network
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from srpkd.taps import FeatureTap, remove_hooks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tap_records_the_output_before_in_place_changes(student: nn.Module, image: Tensor) -> None:
    """The in-place activation after encoder.norm overwrites its output."""
    tap = FeatureTap(student, ["encoder.conv", "encoder.norm", "encoder.act"])
    with tap.recording() as features:
        student(image)
    convolved = student.encoder.conv(image)
    torch.testing.assert_close(features["encoder.conv"], convolved)
    torch.testing.assert_close(features["encoder.norm"], F.instance_norm(convolved))
    assert (features["encoder.norm"] < 0).any()
    torch.testing.assert_close(features["encoder.act"], F.instance_norm(convolved).relu())


def test_tap_passes_gradients_and_does_not_change_the_output(student: nn.Module, image: Tensor) -> None:
    expected = student(image)
    tap = FeatureTap(student, ["encoder.norm"])
    with tap.recording() as features:
        output = student(image)
    assert torch.equal(output, expected)
    features["encoder.norm"].square().sum().backward()
    assert student.encoder.conv.weight.grad.abs().sum() > 0
    assert student.decoder.weight.grad is None


def test_each_recording_contains_its_own_pass(student: nn.Module, image: Tensor) -> None:
    tap = FeatureTap(student, ["decoder"])
    with tap.recording() as first:
        student(image)
    student(image)  # not recorded
    with tap.recording() as second:
        student(2 * image)
    torch.testing.assert_close(first["decoder"], student(image))
    torch.testing.assert_close(second["decoder"], student(2 * image))


@pytest.mark.parametrize("name", ["encoder.nrom", "encodr.norm", "norm", "", "model.9"])
def test_unknown_name_lists_the_nearest(name: str, student: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"the student has no module named '{name}'.*nearest.*'encoder.norm'"):
        FeatureTap(student, [name], "student")
    assert hooks(student) == 0


def test_a_tap_keeps_no_features_alive(student: nn.Module, image: Tensor) -> None:
    """With them the graph of a pass would stay in memory until the next pass."""
    tap = FeatureTap(student, ["encoder"])
    with tap.recording() as features:
        student(image)
    feature = weakref.ref(features["encoder"])
    assert feature() is not None
    del features
    assert feature() is None


def test_hooks_of_a_dropped_tap_leave_the_network(student: nn.Module, image: Tensor) -> None:
    """With a new tap for each of many students, the passes of their teacher would become slower and slower."""
    for _ in range(10):
        tap = FeatureTap(student, ["encoder", "encoder.conv", "decoder"])
        with tap.recording() as features:
            student(image)
        assert set(features) == {"encoder", "encoder.conv", "decoder"}
    assert hooks(student) == 3
    del tap
    assert torch.equal(student(image), student.decoder(features["encoder"]))
    assert hooks(student) == 0


def test_layer_that_does_not_run_raises(student: nn.Module, image: Tensor) -> None:
    tap = FeatureTap(student, ["encoder", "decoder"], "student")
    with pytest.raises(RuntimeError, match=r"student layers \['decoder'\] did not run"), tap.recording():
        student.encoder(image)
    with pytest.raises(RuntimeError, match=r"\['encoder', 'decoder'\] did not run"), tap.recording():
        pass


def test_module_that_runs_twice_raises(student: nn.Module, image: Tensor) -> None:
    tap = FeatureTap(student, ["encoder"], "student")
    with pytest.raises(RuntimeError, match="'encoder' ran more than once"), tap.recording():
        student.encoder(image)
        student.encoder(image)


@pytest.mark.parametrize(("kind", "key"), [(tuple, "0"), (lambda pair: dict(zip(("low", "high"), pair)), "low")])
def test_module_that_returns_no_tensor_raises(kind: Callable, key: str, image: Tensor) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> object:
            return kind((x, x))

    network = nn.ModuleDict({"pair": Pair()})
    tap = FeatureTap(network, ["pair"], "teacher")
    message = rf"teacher module 'pair' returned a (tuple|dict).* such as 'pair\[{key}\]'"
    with pytest.raises(TypeError, match=message), tap.recording():
        network["pair"](image)


class Holders(nn.Module):
    """A network whose encoder has two names, and whose blocks are held by a ModuleList and a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.backbone = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.heads = nn.ModuleDict({"image": nn.Conv2d(4, 3, 1)})

    def forward(self, x: Tensor) -> dict[str, object]:
        x = self.blocks[0](self.encoder(x))
        return {"features": [x, -x], "image": self.heads["image"](x)}


def test_shared_module_has_several_names(image: Tensor) -> None:
    network = Holders()
    tap = FeatureTap(network, ["encoder", "backbone"])
    with tap.recording() as features:
        network(image)
    assert torch.equal(features["encoder"], network.encoder(image))
    assert torch.equal(features["backbone"], features["encoder"])


def test_elements_of_the_networks_own_output(image: Tensor) -> None:
    network = Holders()
    tap = FeatureTap(network, ["[features][1]", "[image]"])
    with tap.recording() as features:
        output = network(image)
    assert torch.equal(features["[features][1]"], output["features"][1])
    assert torch.equal(features["[image]"], output["image"])
    message = r"layer '\[last\]': no element \[last\] in a dict with the keys 'features'"
    with pytest.raises(ValueError, match=message), FeatureTap(network, ["[last]"]).recording():
        network(image)


@pytest.mark.parametrize(("name", "entry"), [("blocks", "blocks.0"), ("heads[image]", "heads.image")])
def test_module_that_only_holds_modules_names_its_entries(name: str, entry: str) -> None:
    message = (
        rf"network layer '{re.escape(name)}' would not run: it is a Module(List|Dict), .* tap one of \['{entry}'\]"
    )
    with pytest.raises(ValueError, match=message):
        FeatureTap(Holders(), [name])


def test_network_without_python_modules(student: nn.Module, image: Tensor) -> None:
    """TorchScript, and a graph of torch.fx or torch.export that does not call the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced, scripted = torch.jit.trace(student, image), torch.jit.script(student)
        frozen = torch.jit.freeze(torch.jit.script(network(4).eval()))
    for whole in (traced, scripted, frozen):
        with pytest.raises(TypeError, match=r"the teacher is a TorchScript module, .* expected the nn.Module"):
            FeatureTap(whole, ["encoder"], "teacher")
    with pytest.raises(TypeError, match="module '0' of the teacher is a TorchScript module"):
        FeatureTap(nn.Sequential(scripted), ["0"], "teacher")
    outer = nn.Sequential(traced, nn.Identity())
    tap = FeatureTap(outer, ["0", "1"])
    with tap.recording() as features:
        outer(image)
    assert torch.equal(features["0"], features["1"])  # a traced module as a whole has hooks
    graph = torch.fx.symbolic_trace(student)
    for module in (graph, torch.export.export(student, (image,)).module()):
        with pytest.raises(ValueError, match=r"layer 'encoder' would not run: .* nodes of its graph: tap the original"):
            FeatureTap(module, ["encoder"])
    tap = FeatureTap(graph, ["encoder.conv"])
    with tap.recording() as features:
        graph(image)
    assert torch.equal(features["encoder.conv"], student.encoder.conv(image))


def test_error_in_a_pass_propagates_and_keeps_the_tap_usable(student: nn.Module, image: Tensor) -> None:
    tap = FeatureTap(student, ["encoder"])
    with pytest.raises(RuntimeError, match="channels"), tap.recording():
        student(torch.randn(1, 5, 8, 8))
    student(image)
    student(image)  # not recording: running twice is no error
    with tap.recording() as features:
        student(image)
    assert set(features) == {"encoder"}


def test_overlapping_recordings_raise(student: nn.Module, image: Tensor) -> None:
    """Another thread's pass would be recorded as one's own."""
    tap = FeatureTap(student, ["encoder"], "student")
    with tap.recording() as features:
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(RuntimeError, match="tap of the student is recording"),
        ):
            pool.submit(lambda: tap.recording().__enter__()).result()
        student(image)
    assert torch.equal(features["encoder"], student.encoder(image))


def test_passes_of_other_threads_are_not_recorded(student: nn.Module, image: Tensor) -> None:
    """Threads may share a teacher, or evaluate a student that is being trained."""
    own, other = (FeatureTap(student, ["encoder"]) for _ in range(2))

    def pass_of_another_thread() -> Tensor:
        with other.recording() as features:
            student(-image)
        return features["encoder"]

    with ThreadPoolExecutor(1) as pool, own.recording() as features:
        before = pool.submit(pass_of_another_thread).result()
        student(image)
        after = pool.submit(pass_of_another_thread).result()
    assert torch.equal(features["encoder"], student.encoder(image))
    assert torch.equal(before, student.encoder(-image)) and torch.equal(before, after)


class Several(nn.Module):
    """A module whose output contains two features: in a tuple, a dict, an object with fields, or nested."""

    def __init__(self, kind: str, width: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> object:
        x = self.conv(x)
        return {
            "tuple": (x, 2 * x),
            "dict": {"0": x, "last": 2 * x},
            "object": types.SimpleNamespace(first=x, last=2 * x),
            "nested": ({"last": [x, 2 * x]}, None),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tuple", ["0[0]", "0[1]", "0[-1]"]),
        ("dict", ["0[0]", "0[last]", '0["last"]']),
        ("object", ["0[first]", "0[last]", "0['last']"]),
        ("nested", ["0[0][last][0]", "0[0][last][1]", "0[0][last][-1]"]),
    ],
)
def test_taps_of_elements_and_fields(kind: str, names: list[str], image: Tensor) -> None:
    network = nn.Sequential(Several(kind))
    tap = FeatureTap(network, names)
    with tap.recording() as features:
        network(image)
    expected = network[0].conv(image)
    assert list(features) == names
    for name, scale in zip(names, (1, 2, 2), strict=True):
        torch.testing.assert_close(features[name], scale * expected)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("tuple", "0", r"module '0' returned a tuple \(Tensor, Tensor\): .* such as '0\[0\]'"),
        ("tuple", "0[2]", r"layer '0\[2\]': no element \[2\] in a tuple \(Tensor, Tensor\)"),
        ("dict", "0[first]", r"no element \[first\] in a dict with the keys '0', 'last'"),
        ("tuple", "0.conv[0]", r"no element \[0\] in a Tensor of shape \(2, 4, 8, 8\)"),
        ("nested", "0[1]", "returned a NoneType: tap a module"),
    ],
)
def test_elements_that_do_not_exist(kind: str, name: str, message: str, image: Tensor) -> None:
    network = nn.Sequential(Several(kind))
    tap = FeatureTap(network, [name])
    with pytest.raises((TypeError, ValueError), match=message), tap.recording():
        network(image)


def test_unknown_module_of_an_element_lists_the_nearest(student: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no module named 'encodr'; the nearest names are 'encoder'"):
        FeatureTap(student, ["encodr[0]"])


# --- wrappers and networks without Python layers ---


class Engine(nn.Module):
    """A wrapper as that of Lightning Fabric, which has the network as ``module`` and registers it by another name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._forward_module = network

    @property
    def module(self) -> nn.Module:
        return self._forward_module

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


def with_encoder(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Return a function that wraps the encoder of a network in place."""

    def replace(network: nn.Module) -> nn.Module:
        network.encoder = wrap(network.encoder)
        return network

    return replace


@pytest.mark.parametrize(
    "wrap",
    [
        Engine,
        AveragedModel,
        checkpoint_wrapper,
        lambda network: Engine(AveragedModel(compiled(network))),
        *map(with_encoder, (compiled, checkpoint_wrapper)),
    ],
    ids=["engine", "averaged", "checkpoint", "several", "compiled encoder", "checkpointed encoder"],
)
def test_layers_keep_their_names_in_a_wrapper(wrap: Callable, student: nn.Module, image: Tensor) -> None:
    names = ["encoder", "encoder.conv", "encoder.norm", "decoder"]
    tap = FeatureTap(student, names)
    with tap.recording() as expected:
        student(image)
    tap.close()
    wrapped = wrap(student)
    tap = FeatureTap(wrapped, names)
    with tap.recording() as features:
        wrapped(image)
    torch.testing.assert_close(features, expected)
    own = next(name for name, module in wrapped.named_modules() if isinstance(module, nn.Conv2d))
    FeatureTap(wrapped, [own])  # the names of named_modules() remain valid


def test_data_parallel_of_several_gpus_is_refused(student: nn.Module) -> None:
    """It runs copies of the network in other threads, whose features would be missing."""
    wrapped = nn.DataParallel(student)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"the network is a DataParallel of 2 GPUs.*Use DistributedDataParallel"):
        FeatureTap(wrapped, ["model.0"])
    wrapped.device_ids = [0]
    FeatureTap(wrapped, [next(name for name, _ in student.named_children())])


def test_own_layer_takes_precedence_over_that_of_module(image: Tensor) -> None:
    """A network may have a submodule ``module`` without being a wrapper."""
    network = nn.Sequential(OrderedDict(module=nn.Sequential(nn.Conv2d(3, 4, 1)), head=nn.Conv2d(4, 2, 1)))
    network.module.add_module("head", nn.Identity())
    tap = FeatureTap(network, ["head"])
    with tap.recording() as features:
        output = network(image)
    assert torch.equal(features["head"], output)


def test_layer_that_was_replaced_raises(image: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    tap = FeatureTap(network, ["1"], "student")
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with (
        pytest.raises(RuntimeError, match=r"student layers \['1'\] did not run.*after layers are replaced"),
        tap.recording(),
    ):
        network(image)


# --- copies ---


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copy_of_a_tapped_network_does_not_record(make_copy, student: nn.Module, image: Tensor) -> None:
    tap = FeatureTap(student, ["encoder"])
    with tap.recording() as features:
        output = student(image)
        twin = make_copy(student)
        assert torch.equal(twin(2 * image), student.decoder(twin.encoder(2 * image)))
    assert torch.equal(twin(image), output)
    torch.testing.assert_close(features["encoder"], student.encoder(image))
    own = FeatureTap(twin, ["encoder"])
    with own.recording() as features:
        twin(image)
    torch.testing.assert_close(features["encoder"], student.encoder(image))
    tap.close()
    remove_hooks(twin)
    assert hooks(student) == hooks(twin) == 0
