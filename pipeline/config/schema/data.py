"""The section `data`: where images and labels are, a class for each layout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.schema.section import Anywhere, Fraction, Local, Positive, Section, Seed, Tables

LookedFor = Annotated[
    str | None,
    Field(
        description="Name of the class that is looked for, which sensitivity, predictive values and the report speak "
        "of first; null takes the last of two classes, and none of more. It changes no training and no order of "
        "classes."
    ),
]
Expected = Annotated[
    dict[Literal["train", "val", "test", "all"], Positive] | None,
    Field(
        description="How many images there should be, such as `{train: 251, test: 66}` in splits that the data set "
        "comes with (before val is drawn from train), or `{all: 780}`; other numbers stop every command at once. Null "
        "checks nothing."
    ),
]


class SplitRule(Section):
    """Shares of the samples for val and test where the data set has no splits of its own; the rest is train."""

    val: Fraction = 0.15
    """Share of the samples for val, on which the best epoch and thresholds are chosen. Where the data set comes with
    train and test alone it is a share of train.
    """
    test: Fraction = 0.25
    """Share of the samples for test, which `evaluate` reads once."""
    seed: int = 0
    """Another seed draws other splits."""
    draw: Literal["steady", "balanced"] | None = "steady"
    """`steady`: a group's split follows from its own name, whatever comes or goes beside it; shares hold on average.
    `balanced`: they hold for every class, and a data set that changes is drawn anew (as until version 0.2.0). Null:
    nothing is drawn, and where a data set has no splits of its own all of it is test.
    """


class ReadingConfig(Section):
    """How files become uint8 RGB where that is a choice; see `pipeline.data.Reading`."""

    depth: Literal["full", "percentile", "window"] = "full"
    """How more than 8 bits become 8: by the whole range of 16 bits, by the image's own `percentiles`, or by `window`.
    """
    percentiles: tuple[float, float] = (0.5, 99.5)
    """With `depth: percentile`: what becomes black and white, in percent of the image's values."""
    window: tuple[float, float] | None = None
    """With `depth: window`: centre and width in stored values, as DICOM has them (Hounsfield units in CT)."""
    frame: Annotated[int, Field(ge=0)] = 0
    """Page of a TIFF or frame of a DICOM file, counted from 0."""


class DifficultyConfig(Section):
    """How hard the shape is to see in the demo's images; see `pipeline.data.Difficulty`."""

    shape: Fraction = 0.40
    """Depth of notches and spikes, as a share of the radius."""
    contrast: tuple[float, float] = (6.0, 17.0)
    """Range of the lesion's echo below that of the tissue around it, in dB."""
    speckle: Annotated[float, Field(ge=0)] = 0.33
    """Strength of the speckle; 1 is fully developed, 0 is none."""
    structures: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (1, 3)
    """Smallest and largest number of bright structures around the lesion."""
    radius: tuple[Annotated[float, Field(gt=0, le=0.3)], Annotated[float, Field(gt=0, le=0.3)]] = (0.13, 0.20)
    """Smallest and largest radius of the lesion, as a share of the side."""


class DemoData(Section):
    """Ultrasound-like images made on the spot (`layout: demo`)."""

    layout: Literal["demo"]
    """Images of a demo, which `prepare` makes."""
    path: Anywhere
    """Folder that they are made in, or the URL of a copy of it."""
    count: Positive = 360
    """How many."""
    size_px: Annotated[int, Field(ge=32)] = 128
    """Side of the square images."""
    seed: Seed = 0
    """Another seed, other images."""
    difficulty: DifficultyConfig = DifficultyConfig()
    """How hard they are."""
    positive: LookedFor = None
    expect: Expected = None


class MedMnistData(Section):
    """An `.npz` file of MedMNIST with its own splits (`layout: medmnist`)."""

    layout: Literal["medmnist"]
    """An official archive of MedMNIST, which `prepare` fetches."""
    name: str
    """Name of the set, such as `breastmnist`."""
    path: Anywhere
    """The `.npz` file, where it is or shall be, or its URL; its name is the official one."""
    size_px: Literal[28, 64, 128, 224] = 28
    """Side of the images in the archive to fetch."""
    masks: Anywhere | None = None
    """An `.npz` file, or its URL, with masks of the findings, `{train,val,test}_masks` (n, H, W), for
    `encoder.name: mask` and `explain`; MedMNIST has none of its own.
    """
    positive: LookedFor = None
    expect: Expected = None


class FolderData(Section):
    """`root/class/image`, or `root/split/class/image` (`layout: folder`)."""

    layout: Literal["folder"]
    """A folder of images, whose sub-folders are classes, or splits with classes in them."""
    path: Anywhere
    """The folder, or its URL: `s3://`, `gs://`, `hf://` and whatever else fsspec reads. Plain http lists no folder:
    there it is the URL of a text file that ends in `.txt`, lies in the folder, and names a file of it in each line.
    """
    group_pattern: str | None = None
    """Regular expression searched in each file name; its first parenthesis, or else the whole match, is the group (a
    patient), which never straddles splits. Without it every image is a group.
    """
    masks: str | None = None
    """How the mask files of an image are called: `{stem}_mask*.png` are those beside it whose names begin with its own.
    Several of one image are merged, and none is taken for an image. `encoder.name: mask` and `explain` use them.
    """
    skip: tuple[str, ...] = ()
    """Patterns of files that are no images of this data set, such as `[*_overlay.png]`, for the file's name or its path
    below the folder.
    """
    split: SplitRule = SplitRule()
    """How splits are drawn where the folder has none, and val where it has train and test alone."""
    reading: ReadingConfig = ReadingConfig()
    """How files become 8 bits."""
    positive: LookedFor = None
    expect: Expected = None


class CsvData(Section):
    """A table with a row per image (`layout: csv`)."""

    layout: Literal["csv"]
    """A table with a row per image."""
    path: Tables
    """The table or its URL, or a mapping with one table each for `train`, `val` and `test`."""
    images: Anywhere | None = None
    """Folder that the paths in the table are relative to, or its URL; null is the one that the table lies in."""
    path_column: str
    """Column of the image's path, or of its URL."""
    label_column: str | None = None
    """Column of the class name."""
    label_columns: tuple[str, ...] = ()
    """Instead of `label_column`: one column of 0 and 1 for each class, in the order of the classes."""
    rest_class: str | None = None
    """With `label_columns`: name of one more class, for rows that have 0 in all of them."""
    split_column: str | None = None
    """Column of the split: train, val or test, in their usual spellings. Without it splits are drawn."""
    group_column: str | None = None
    """Column of the group (a patient), which never straddles splits. Without it every image is a group."""
    suffix: str = ""
    """Appended to every path, such as `.jpg`."""
    mask_column: str | None = None
    """Column of the path of a lesion mask, relative to `images`."""
    task: Literal["multiclass", "binary", "ordinal", "multilabel"] | None = None
    """What the labels mean: `multilabel` lets any number of `label_columns` be 1, `ordinal` says that classes ascend.
    Null: binary or multiclass, by the number of classes.
    """
    split: SplitRule = SplitRule()
    """How splits are drawn where the table has none, and val where it has train and test alone."""
    reading: ReadingConfig = ReadingConfig()
    """How files become 8 bits."""
    subgroup_columns: tuple[str, ...] = ()
    """Columns whose values `evaluate` scores by themselves, such as `[sex, age]`; cells may be empty."""
    subgroup_bands: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """For columns of numbers among `subgroup_columns`, the limits between bands, such as `{age: [40, 60]}`."""
    positive: LookedFor = None
    expect: Expected = None


class StoreData(Section):
    """A store of features with its labels, and no images (`layout: store`).

    Of the other sections only `run` is needed then: features come from this store, and the encoder is the one it names.
    """

    layout: Literal["store"]
    """A store that was sent to you."""
    path: Local
    """The store, sent with its labels (`pipeline store push --with-labels`)."""
    task: Literal["multiclass", "binary", "ordinal", "multilabel"] | None = None
    """What the labels mean; null takes what travels with them, or what they look like."""
    positive: LookedFor = None
    expect: Expected = None


DataConfig = Annotated[DemoData | MedMnistData | FolderData | CsvData | StoreData, Field(discriminator="layout")]
