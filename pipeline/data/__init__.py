"""Data sets of five layouts behind one description: samples, splits, groups, and pixels as uint8 RGB.

A path and plain options come in, a `Dataset` goes out. May import: cache. Open `dataset.py` first; `layouts/` is
where samples come from.
"""

from pipeline.data.dataset import Dataset, Draw, Image, Label, Mask, Sample, Split, Task, identical_across_splits
from pipeline.data.depth import Reading
from pipeline.data.external import as_test_set
from pipeline.data.folds import in_fold
from pipeline.data.image import pixel_digest, pixels_of, read_image, reading_rules
from pipeline.data.layouts.demo import generate_demo, load_demo
from pipeline.data.layouts.demo_captions import captioned_arrays
from pipeline.data.layouts.demo_images import CLASS_NAMES as DEMO_CLASSES
from pipeline.data.layouts.demo_images import Difficulty, demo_arrays, demo_objects
from pipeline.data.layouts.folder import load_folder
from pipeline.data.layouts.medmnist import load_medmnist
from pipeline.data.layouts.medmnist_sets import fetch_medmnist
from pipeline.data.layouts.table import load_csv
from pipeline.data.load import load_dataset
from pipeline.data.named import images_named
from pipeline.data.splits import few_shots, stratified_part

__all__ = [
    "DEMO_CLASSES",
    "Dataset",
    "Difficulty",
    "Draw",
    "Image",
    "Label",
    "Mask",
    "Reading",
    "Sample",
    "Split",
    "Task",
    "as_test_set",
    "captioned_arrays",
    "demo_arrays",
    "demo_objects",
    "fetch_medmnist",
    "few_shots",
    "generate_demo",
    "identical_across_splits",
    "images_named",
    "in_fold",
    "load_csv",
    "load_dataset",
    "load_demo",
    "load_folder",
    "load_medmnist",
    "pixel_digest",
    "pixels_of",
    "read_image",
    "reading_rules",
    "stratified_part",
]
