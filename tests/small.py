"""What the trainer's tests share: options of networks so small that a step takes no time."""

SIZE = 16  # pixels a side
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
