"""Forward passes against a plain reimplementation of the public CycleGAN, pix2pix and CUT generators."""

import pytest
import torch
import torch.nn.functional as F
from cut_layout import ANTIALIAS, DOWN, UP

from srpkd.models.networks import define_generator

# The forward pass, compared with the architecture written as plain functions of the weights


def functional_norm(state, key, x):
    head, _, index = key.rpartition(".")
    if f"{key}.weight" not in state:  # the convolution before an instance norm has a bias
        return F.instance_norm(x) if f"{head}.{int(index) - 1}.bias" in state else x
    w, b, mean, var = (state[f"{key}.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
    return F.batch_norm(x, mean, var, w, b)


def functional_resnet(state, x, blocks, second=5, antialias="none"):
    anti_down, anti_up = antialias in ("down", "both"), antialias in ("up", "both")
    down_filters, down, first = DOWN[anti_down]
    up_filters, up, last = UP[anti_up]

    def conv(key, x, **kwargs):
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), **kwargs)

    def pad(x, by, mode="reflect"):
        return F.pad(x, (by, by, by, by), mode=mode)

    def blur_and_halve(key, x):
        return F.conv2d(pad(x, 1), state[f"{key}.filt"], stride=2, groups=x.shape[1])

    def double(key, x):
        height, width = x.shape[2:]
        out = F.conv_transpose2d(pad(x, 1, "replicate"), state[f"{key}.filt"], stride=2, groups=x.shape[1])
        return out[:, :, 3 : 3 + 2 * height, 3 : 3 + 2 * width]

    x = F.relu(functional_norm(state, "model.2", conv("model.1", pad(x, 3))))
    for stage, i in enumerate(down):
        x = conv(f"model.{i}", x, stride=1 if anti_down else 2, padding=1)
        x = F.relu(functional_norm(state, f"model.{i + 1}", x))
        x = blur_and_halve(f"model.{down_filters[stage]}", x) if anti_down else x
    for i in range(first, first + blocks):
        key = f"model.{i}.conv_block"
        y = F.relu(functional_norm(state, f"{key}.2", conv(f"{key}.1", pad(x, 1))))
        x = x + functional_norm(state, f"{key}.{second + 1}", conv(f"{key}.{second}", pad(y, 1)))
    end = first + blocks
    for stage, i in enumerate(end + index for index in up):
        if anti_up:
            x = conv(f"model.{i}", double(f"model.{end + up_filters[stage]}", x), padding=1)
        else:
            w, b = state[f"model.{i}.weight"], state.get(f"model.{i}.bias")
            x = F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1)
        x = F.relu(functional_norm(state, f"model.{i + 1}", x))
    return torch.tanh(conv(f"model.{end + last}", pad(x, 3)))


def functional_unet(state, x, num_downs):
    def down(key, x):
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), stride=2, padding=1)

    def up(key, x):
        return F.conv_transpose2d(F.relu(x), state[f"{key}.weight"], state.get(f"{key}.bias"), stride=2, padding=1)

    def block(key, x, level):
        x = F.leaky_relu(x, 0.2)  # the skip connection has this x, not the raw one
        y = down(f"{key}.1", x)
        if level == num_downs - 1:
            return torch.cat([x, functional_norm(state, f"{key}.4", up(f"{key}.3", y))], 1)
        y = block(f"{key}.3.model", functional_norm(state, f"{key}.2", y), level + 1)
        return torch.cat([x, functional_norm(state, f"{key}.6", up(f"{key}.5", y))], 1)

    x = block("model.model.1.model", down("model.model.0", x), 1)
    return torch.tanh(up("model.model.3", x))


def randomised(net):
    """Set random weights, biases and statistics in float64, so that every one affects the output."""
    net = net.double().eval()
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.5 - 0.2)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_()
    return net


@pytest.mark.parametrize("antialias", ANTIALIAS)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_resnet_forward_is_that_of_the_public_code(norm, dropout, antialias):
    net = randomised(define_generator("resnet_2blocks", 2, 4, ngf=3, norm=norm, dropout=dropout, antialias=antialias))
    x = torch.randn(2, 2, 16, 20, dtype=torch.float64)
    expected = functional_resnet(net.state_dict(), x, 2, second=6 if dropout else 5, antialias=antialias)
    assert expected.shape == (2, 4, 16, 20)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("antialias", ANTIALIAS)
def test_resnet_output_is_bit_equal_to_that_of_the_public_code(norm, antialias):
    net = define_generator("resnet_3blocks", ngf=4, norm=norm, antialias=antialias, init_gain=0.2).eval()
    x = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        assert net(x).std() > 1e-3
        assert torch.equal(net(x), functional_resnet(net.state_dict(), x, 3, antialias=antialias))


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("num_downs", [4, 5, 6])
def test_unet_forward_is_that_of_the_public_code(num_downs, norm):
    net = randomised(define_generator(f"unet_{2**num_downs}", 2, 4, ngf=2, norm=norm, dropout=True))
    x = torch.randn(2, 2, 2**num_downs, 2 ** (num_downs + 1), dtype=torch.float64)
    expected = functional_unet(net.state_dict(), x, num_downs)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_unet_skips_carry_the_activated_tensor(norm):
    """It does not show in the output, as relu(leaky_relu(x)) = relu(x), but in a feature tap on a level."""
    net = randomised(define_generator("unet_32", ngf=3, norm=norm))
    raw, level = [], []
    net.get_submodule("model.model.0").register_forward_hook(lambda _m, _i, out: raw.append(out.clone()))
    net.get_submodule("model.model.1").register_forward_hook(lambda _m, _i, out: level.append(out.clone()))
    net(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    skipped = level[0][:, :3]
    assert raw[0].min() < 0
    torch.testing.assert_close(skipped, F.leaky_relu(raw[0], 0.2))
