"""Data sets of four layouts behind one description: samples, splits, groups, and pixels as uint8 RGB."""

from pipeline.data.dataset import Dataset, Image, Label, Mask, Sample, Split, Task, identical_across_splits
from pipeline.data.image import Reading, pixel_digest, read_image, reading_rules

__all__ = [
    "Dataset",
    "Image",
    "Label",
    "Mask",
    "Reading",
    "Sample",
    "Split",
    "Task",
    "identical_across_splits",
    "pixel_digest",
    "read_image",
    "reading_rules",
]
