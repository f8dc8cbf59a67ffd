"""Benchmarks and the study; run from the repository's root: ``python -m bench COMMAND``."""
