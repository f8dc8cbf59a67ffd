"""The trainer: options, objectives, the training loop, and what a run leaves on disk."""
