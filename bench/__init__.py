"""Benchmarks, run from the repository's root: ``python -m bench relation|train|accuracy|scaling|plot|table``."""
