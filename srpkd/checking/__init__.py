"""Checks of every backend and CUDA kernel against float64: what ``srpkd check`` and the benchmarks share."""
