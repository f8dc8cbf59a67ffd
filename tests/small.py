"""Options of networks so small that a training step takes milliseconds."""

SIZE = 16  # side of an image in pixels
SMALL = {
    "dataroot": ":synthetic:",
    "netG": "resnet_1blocks",
    "norm": "instance",
    "no_dropout": True,
    "netD": "n_layers",
    "n_layers_D": 1,
    "synthetic_size": SIZE,
    "batch_size": 2,
    "device": "cpu",
}
