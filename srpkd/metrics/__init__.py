"""Image metrics: pixel by pixel, by Inception features, by segmentation."""
