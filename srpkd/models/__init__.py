"""Networks: architectures, checkpoint files, inference, export, and cost."""
