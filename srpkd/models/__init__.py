"""Networks, their checkpoint files, and what they cost."""
