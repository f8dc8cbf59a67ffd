"""Datasets: folders of images and their validation, synthetic scenes, and batches of either."""
