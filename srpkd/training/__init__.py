"""The trainer: options, objectives, training loop, and the files that a run writes."""
