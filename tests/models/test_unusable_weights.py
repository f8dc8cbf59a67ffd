"""Weights that cannot be used: values that are not finite, and tensors of other kinds."""

from dataclasses import replace

import pytest
import torch
from small_generators import SMALL, assert_same, make, refusal

from srpkd.models.checkpoints import load_generator, load_weights


def with_value(value, key="model.1.weight"):
    weights = make(replace(SMALL, norm="batch")).state_dict()
    weights[key].view(-1)[1] = value
    return weights


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "nan"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
@pytest.mark.parametrize("key", ["model.1.weight", "model.2.running_var", "model.2.bias"])
def test_weights_that_are_not_finite(tmp_path, suffix, value, kind, key):
    path = tmp_path / f"net{suffix}"
    weights = with_value(value, key)
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    for function in (load_weights, load_generator):
        message = refusal(path, function)
        assert f"the tensor {key} is not finite (1 of {weights[key].numel()} values are {kind})" in message
        assert "use an earlier checkpoint" in message


def test_unused_statistics_may_be_anything(tmp_path):
    weights = make().state_dict()
    torch.save(weights | {"model.2.running_var": torch.tensor([float("nan")] * 2)}, tmp_path / "net.pth")
    assert_same(load_weights(tmp_path / "net.pth"), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_finite_weights_of_other_dtypes_are_loaded(tmp_path, dtype):
    weights = {key: value.to(dtype) for key, value in make().state_dict().items()}
    torch.save(weights, tmp_path / "net.pth")
    assert_same(
        load_generator(tmp_path / "net.pth").state_dict(), {key: value.float() for key, value in weights.items()}
    )
    weights["model.1.weight"] = torch.full_like(weights["model.1.weight"], float("nan"), dtype=dtype)
    torch.save(weights, tmp_path / "net.pth")
    assert "the tensor model.1.weight is not finite" in refusal(tmp_path / "net.pth")


def test_weights_beyond_the_range_of_float32(tmp_path):
    weights = {key: value.double() for key, value in make().state_dict().items()}
    weights["model.1.weight"] *= 1e300
    torch.save(weights, tmp_path / "net.pth")
    assert "the tensor model.1.weight is not finite in float32" in refusal(tmp_path / "net.pth", load_generator)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda value: value.to_sparse(), "quantized, sparse, or without data (model.1.weight)"),
        (lambda value: value.to("meta"), "quantized, sparse, or without data (model.1.weight)"),
        (lambda value: value.to(torch.complex64), "wrong dtype: model.1.weight torch.complex64"),
        (lambda value: value.long(), "wrong dtype: model.1.weight torch.int64"),
    ],
    ids=["sparse", "meta", "complex", "integers"],
)
def test_tensors_of_other_kinds(tmp_path, convert, message):
    weights = make().state_dict()
    weights["model.1.weight"] = convert(weights["model.1.weight"])
    torch.save(weights, tmp_path / "net.pth")
    assert message in refusal(tmp_path / "net.pth", load_generator)
