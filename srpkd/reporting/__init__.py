"""The page of a training run: its pictures, curves and tables."""
