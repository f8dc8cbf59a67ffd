"""Tile sizes and compile options of the closed form's kernels."""

BLOCK_CHANNELS = 64  # rows and columns of a tile of a moment
BLOCK_SUM = 32  # pixels or channels that a tensor core sums before the result is added in float32
SPLIT_PIXELS = 1024  # pixels that are summed in float32
BLOCK_FINISH = 32  # rows and columns of a tile of the float64 sums
BLOCK_PIXELS = 64  # pixels of a program that computes the gradient
BLOCK_VECTOR = 1024  # scales or partial losses that are read at a time
# Without fused multiply-adds: a fused z - alpha p of equal features would be a rounding error instead of 0.
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
FINISH_OPTIONS = OPTIONS | {"num_warps": 4}
