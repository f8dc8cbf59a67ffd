"""Where the layers of the public CycleGAN and CUT ResNets are, for the tests of the generators."""

ANTIALIAS = ("none", "down", "up", "both")
# The positions in CUT's Sequential of: filters and convolutions before the blocks; the first block; and, after the last
# block, filters, convolutions with a norm, and the last convolution.
DOWN = {False: ((), (4, 7), 10), True: ((7, 11), (4, 8), 12)}
UP = {False: ((), (0, 3), 7), True: ((0, 4), (1, 5), 9)}
