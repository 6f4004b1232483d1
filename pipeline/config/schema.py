"""The configuration: strict, frozen, and left at the door (models and loops take plain keyword arguments)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.config.check import validate
from pipeline.config.file import parse_override, read_yaml, set_key
from pipeline.url import AnyPath, any_path, is_url


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


_PATH: Literal["path_type"] = "path_type"


def _here(given: Any) -> Any:
    """Refuse a URL where only a path of this machine will do."""
    if isinstance(given, str) and is_url(given):
        expected = "a path of this machine, and this is a URL"
        raise PydanticCustomError(_PATH, expected)
    return given


def _anywhere(given: Any) -> AnyPath:
    """A path of this machine, or a URL."""
    if not isinstance(given, str):
        expected = "a path or a URL"
        raise PydanticCustomError(_PATH, expected)
    return any_path(given)


def _tables(given: Any) -> AnyPath | dict[str, AnyPath]:
    """A table, or one for each split."""
    splits = given if isinstance(given, dict) and given.keys() <= {"train", "val", "test"} else {}
    if isinstance(given, str):
        return any_path(given)
    if not splits or not all(isinstance(path, str) for path in splits.values()):
        expected = "a path or a URL, or a mapping with one for train, val and test each"
        raise PydanticCustomError(_PATH, expected)
    return {split: any_path(path) for split, path in splits.items()}


def _texts(tables: AnyPath | Mapping[str, AnyPath]) -> str | dict[str, str]:
    """The same as text, without what gives access."""
    return {split: str(path) for split, path in tables.items()} if isinstance(tables, Mapping) else str(tables)


Local = Annotated[Path, BeforeValidator(_here)]
Anywhere = Annotated[
    AnyPath, PlainValidator(_anywhere), PlainSerializer(str, str, when_used="json"), WithJsonSchema({"type": "string"})
]
Tables = Annotated[
    AnyPath | dict[Literal["train", "val", "test"], AnyPath],
    PlainValidator(_tables),
    PlainSerializer(_texts, Any, when_used="json"),
    WithJsonSchema({}),
]

STORED = "stored"  # the name of an encoder that only a store knows
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Expected = dict[Literal["train", "val", "test", "all"], Positive]


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
    draw: Literal["steady", "balanced"] = "steady"
    """`steady`: a group's split follows from its own name, whatever comes or goes beside it; shares hold on average.
    `balanced`: they hold for every class, and a data set that changes is drawn anew (as until version 0.2.0).
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
    path: Local
    """Folder that they are made in."""
    count: Positive = 360
    """How many."""
    size_px: Annotated[int, Field(ge=32)] = 128
    """Side of the square images."""
    seed: int = 0
    """Another seed, other images."""
    difficulty: DifficultyConfig = DifficultyConfig()
    """How hard they are."""
    positive: str | None = None
    """Name of the class that is looked for, which sensitivity, predictive values and the report speak of first; null
    takes the last of two classes, and none of more. It changes no training and no order of classes.
    """
    expect: Expected | None = None
    """How many images there should be, such as `{train: 251, test: 66}` in splits that the data set comes with (before
    val is drawn from train), or `{all: 780}`; other numbers stop every command at once. Null checks nothing.
    """


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
    positive: str | None = None
    """Name of the class that is looked for, which sensitivity, predictive values and the report speak of first; null
    takes the last of two classes, and none of more. It changes no training and no order of classes.
    """
    expect: Expected | None = None
    """How many images there should be, such as `{train: 251, test: 66}` in splits that the data set comes with (before
    val is drawn from train), or `{all: 780}`; other numbers stop every command at once. Null checks nothing.
    """


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
    positive: str | None = None
    """Name of the class that is looked for, which sensitivity, predictive values and the report speak of first; null
    takes the last of two classes, and none of more. It changes no training and no order of classes.
    """
    expect: Expected | None = None
    """How many images there should be, such as `{train: 251, test: 66}` in splits that the data set comes with (before
    val is drawn from train), or `{all: 780}`; other numbers stop every command at once. Null checks nothing.
    """


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
    subgroup_bands: dict[str, tuple[float, ...]] = {}
    """For columns of numbers among `subgroup_columns`, the limits between bands, such as `{age: [40, 60]}`."""
    positive: str | None = None
    """Name of the class that is looked for, which sensitivity, predictive values and the report speak of first; null
    takes the last of two classes, and none of more. It changes no training and no order of classes.
    """
    expect: Expected | None = None
    """How many images there should be, such as `{train: 251, test: 66}` in splits that the data set comes with (before
    val is drawn from train), or `{all: 780}`; other numbers stop every command at once. Null checks nothing.
    """


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
    positive: str | None = None
    """Name of the class that is looked for; see the other layouts."""
    expect: Expected | None = None
    """How many images there should be, such as `{train: 251, test: 66}` in splits that the data set comes with (before
    val is drawn from train), or `{all: 780}`; other numbers stop every command at once. Null checks nothing.
    """


DataConfig = Annotated[DemoData | MedMnistData | FolderData | CsvData | StoreData, Field(discriminator="layout")]


class DemoTraining(Section):
    """How `prepare` trains the miniature SAM; 0 steps leave first weights drawn from the seed, of any encoder."""

    images: Positive = 800
    """Images to train the miniature SAM on."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Training steps; 0 draws the weights from the seed instead."""
    seed: int = 1
    """Of its images and weights."""


class MasksConfig(Section):
    """How everything in an image is segmented, where `encoder.taps` has `masks`.

    Null is what suits the encoder's weights: see `pipeline.encoders.masks.rules`.
    """

    prompts: Literal["points", "boxes"] | None = None
    """What the mask decoder is asked: a grid of points, or of boxes; null is what its weights were trained on, which is
    boxes for MedSAM and LiteMedSAM, and points for the others.
    """
    points: Annotated[int, Field(ge=1, le=256)] | None = None
    """Points along each side of the grid; null is 32."""
    box_sides: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Sides of the square boxes, as shares of the image's longer side; null is three."""
    box_step: Annotated[float, Field(ge=0.05, le=1)] | None = None
    """From one box to the next of its side, as a share of that side."""
    predicted_iou: Fraction | None = None
    """Masks of which the decoder itself expects no larger IoU are dropped."""
    stability: Fraction | None = None
    """Masks that change more than this with the cut-off are dropped: IoU of the masks at two cut-offs."""
    stability_offset: Annotated[float, Field(ge=0, le=100)] | None = None
    """How far those cut-offs are from the usual one, in logits."""
    overlap: Fraction | None = None
    """IoU of the boxes around two masks above which the one with the smaller predicted IoU is dropped."""
    min_region_px: Annotated[int, Field(ge=0, le=2**20)] | None = None
    """Holes and islands of fewer pixels of the stored map are filled and removed; 0 for none."""
    side_px: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Side of the stored map; null is 256."""


class EncoderConfig(Section):
    """The frozen encoder of stage one; `mask` is none: the known mask as a tap (see `pipeline.encoders.known_mask`).

    With `layout: store` it may be left out, and is `stored`: the one that the store names, which encodes nothing new.
    """

    name: str
    """Which encoder, by its architecture: a name of `docs/encoders.md`."""
    checkpoint: Path
    """Its weights: a published name, which `prepare` fetches, or a file."""
    taps: tuple[str, ...] | None = None
    """Depths at which features are kept; a gate needs its tap here. `masks` are what its mask decoder finds. Null is
    `[patch, early, middle, late, neck]`, of a CLIP `[embedding]`, and of the known mask `[mask]`.
    """
    input_px: Positive | None = None
    """Side at which the encoder sees images; null is its own. Smaller is faster and gives other features."""
    pool: Positive | dict[str, Positive] | None = None
    """Side of the squares of cells that are averaged before the store, SLCA's k; null averages every map to a side of
    16. A number counts cells of the encoder's coarsest grid, and finer grids are averaged in proportion; a mapping has
    cells of its own grid for each tap.
    """
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the matrix products."""
    preprocessing: str | None = None
    """How images become the encoder's input: null is the encoder's own way; MedSAM's weights for `sam_vit_b` want
    `medsam`.
    """
    masks: MasksConfig = MasksConfig()
    """How the tap `masks` is made."""
    training: DemoTraining = DemoTraining()
    """How `prepare` makes the weights of `sam_demo`, or random ones of any encoder."""


class StoreConfig(Section):
    """Where features live, and what their card says of the data: its licence and how to cite it.

    `image_px`, if given, keeps the images there too, at that side: see `pipeline.image_tap`.
    """

    path: Local
    """The store: a folder `NAME.zarr`, or a file `NAME.h5`."""
    dtype: Literal["float16", "float32", "int8", "bfloat16"] = "float16"
    """Type of the stored numbers. int8 has a scale a row and channel and takes half the bytes of float16."""
    image_px: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Keep the images there too, at this side, so that training decodes nothing; null keeps none."""
    shard_mib: Positive = 64
    """Size of a file of the largest tap. With masks a file holds 64 images or a batch at most, as each takes long."""
    license: str = "unknown"
    """Licence of the data, on the store's card."""
    citation: str = "Cite the data set and the encoder that these features come from."
    """How to cite the data, on the store's card."""


class Gate(Section):
    """One gate: a tap of the encoder, or `own` for the classifier's own features, onto a stage of the classifier."""

    tap: str
    """A tap of the encoder, or `own` for the classifier's own features."""
    stage: Literal["stem", "stage1", "stage2", "stage3", "stage4"]
    """The stage that it gates."""


class SlcaConfig(Section):
    """Options of every gate."""

    pool: Positive = 1
    """Side of the squares of stored cells that a gate averages; 1 where the store is pooled already."""
    reduction: Positive = 16
    """How many times fewer channels the hidden layer has than the tap."""
    norm: Literal["standardise", "layer", "layer_on_blocks", "none"] = "standardise"
    """Before a gate: each channel by the training images, LayerNorm (on all taps or blocks'), or nothing."""
    mix: Literal["residual", "multiply"] = "residual"
    """`residual` is x + x * A, `multiply` is x * A."""
    identity_start: bool = False
    """Start as the plain classifier, bit for bit."""


class OverlayConfig(Section):
    """Masks that are painted over the image, in training and in every test; see `pipeline.model.overlay`."""

    tap: str = "masks"
    """Which map of masks; `encoder.taps` must list it."""
    opacity: Fraction = 0.5
    """Of the colours."""
    palette: Literal["rank", "random", "binary", "cutout"] = "rank"
    """`rank`: a colour for each rank, the same in all images. `random`: colours of each image's own. `binary`: white
    masks on black in place of the image. `cutout`: the image without what is in no mask.
    """
    contour: bool = True
    """A thin outline around colours."""
    min_iou: Fraction = 0.0
    """Leave out masks whose predicted IoU is below; needs no new extraction."""
    max_masks: Positive | None = None
    """Paint only so many, those of the highest predicted IoU; null paints all."""


class ClipDemoTraining(Section):
    """How `prepare` trains the miniature CLIP (`clip:demo`, as encoder or as backbone)."""

    images: Positive = 800
    """Images, each shown in two of its flips and turns with a caption."""
    steps: Positive = 160
    """Training steps; more make it better than a demo of learning from few images wants."""
    seed: int = 1
    """Of its images, words and weights."""


class ClipConfig(Section):
    """What CLIP is asked, and how much of its image tower may move (`backbone: clip:NAME`)."""

    templates: tuple[str, ...] = ("This is a photo of {class}",)
    """Sentences with `{class}` in them; what the text tower makes of several is averaged."""
    words: dict[str, str] = {}
    """What to call a class, such as `{malignant: a malignant tumour}`; a class without words goes by its name."""
    lora: Annotated[int, Field(ge=0)] = 0
    """Rank of low-rank adapters, which train instead of the image tower; 0 for none."""
    training: ClipDemoTraining = ClipDemoTraining()
    """How `prepare` makes the weights of `clip:demo`."""


class ModelConfig(Section):
    """The classifier of stage two."""

    backbone: str
    """A ResNet, Swin or other model of torchvision, `timm:NAME` (extra `timm`), `clip:NAME` (extra `clip`), or `none`:
    a linear classifier of `fuse` alone, which reads no image.
    """
    weights: str = "none"
    """`none`, `imagenet` (fetched by `prepare`), or a file; for CLIP a published name, such as `openai`, or `own` for a
    model of the hub or of a folder.
    """
    image_px: Annotated[int, Field(ge=16)] = 224
    """Side of the square image that the classifier sees."""
    gates: tuple[Gate, ...] = ()
    """Which tap gates which stage; none is the plain classifier."""
    fuse: tuple[str, ...] = ()
    """Late fusion: taps whose features, pooled per channel, the last layer reads beside the backbone's own."""
    overlay: OverlayConfig | None = None
    """Masks to paint over the image, such as `{tap: masks}`; null paints nothing."""
    slca: SlcaConfig = SlcaConfig()
    """Options of every gate."""
    clip: ClipConfig = ClipConfig()
    """Prompts and adapters of CLIP."""


class AugmentConfig(Section):
    """How far a training image may be changed; nothing by default. Gates follow every change of place.

    `views` are drawn with features of their own, which `encoder.taps` must list (`neck@hflip`).
    """

    flip_horizontal: Fraction = 0.0
    """Probability of exchanging left and right."""
    flip_vertical: Fraction = 0.0
    """Probability of exchanging top and bottom."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each as likely."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest further turn, to either side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification."""
    shift: Fraction = 0.0
    """Largest shift along each axis, as a part of the side."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest side of a window that is cut out and enlarged, as a part of the side; 1 cuts nothing."""
    brightness: Fraction = 0.0
    """Largest relative change of all values: 0.2 draws a factor from 0.8 to 1.2."""
    contrast: Fraction = 0.0
    """Largest relative change of the distance from the image's mean grey."""
    saturation: Fraction = 0.0
    """Largest relative change of the distance from each pixel's grey."""
    noise: Fraction = 0.0
    """Standard deviation of Gaussian noise, as a part of the full range."""
    views: tuple[Literal["hflip", "vflip", "rot90", "rot180", "rot270", "transpose", "transverse"], ...] = ()
    """Flips and quarter turns to draw with stored features of their own, in place of the flips and turns above."""
    margin: Fraction = 0.0
    """How much larger the decoded image is kept than `model.image_px`, as a part of its side, so that what `crop` and
    `scale` enlarge has detail.
    """


class ProbeConfig(Section):
    """What `pipeline probe` fits to stored features."""

    method: Literal["linear", "zero_shot", "tip", "tip_f"] = "linear"
    """`linear` and nearest neighbours on any taps; or on CLIP's `embedding` the class prompts of `model.clip` alone,
    Tip-Adapter, or Tip-Adapter-F, which tunes its keys.
    """


class TrainConfig(Section):
    """How the classifier is trained; see `pipeline.train.optimise.TrainOptions` for what each key does."""

    epochs: Positive = 100
    """Passes over the training split."""
    batch_size: Positive = 32
    """Samples a step, over all processes."""
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    """`sgd` has Nesterov momentum 0.9."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    gate_lr: Annotated[float, Field(gt=0)] = 10.0
    """What `lr` is multiplied by for the gates."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """On matrices and kernels; biases and norms are left free."""
    schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    """`cosine` to zero, `step` times `gamma` at each milestone, `poly` with power 0.9, or `constant`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the learning rate rises from zero."""
    milestones: tuple[Positive, ...] = ()
    """Epochs of the step schedule."""
    gamma: Annotated[float, Field(gt=0)] = 0.1
    """Factor of the step schedule."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""
    loss: Literal["auto", "cross_entropy"] = "auto"
    """`auto` fits the task; `cross_entropy` trains ordered grades as plain classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs a class by how rare it is."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """`balanced` draws classes equally often, with replacement."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a better score on val after which to stop; 0 never stops."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of a running average of the weights, which is then scored and kept; 0 for none."""
    freeze: tuple[Literal["stem", "stage1", "stage2", "stage3", "stage4", "backbone"], ...] = ()
    """Parts of the backbone that stay as they start; `backbone` is all of them."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is a 16-bit type on a GPU that has one, and float32 elsewhere."""
    seed: int = 0
    """Of weights, order, augmentation and dropout, and of the choice of `fraction` and `shots`."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training split to train on: class by class, whole groups, smaller shares within larger ones."""
    shots: Positive | None = None
    """Images of each class to train on instead of a share: whole groups, fewer within more; null takes the share."""
    alignment: Fraction | None = None
    """Share of CLIP's image-text contrast in the objective, beside the cross-entropy; null is 0.5 for CLIP."""
    text_lr: Annotated[float, Field(ge=0)] = 0.0
    """What `lr` is multiplied by for CLIP's text tower; 0 leaves it as it starts."""
    augment: AugmentConfig = AugmentConfig()
    """How far a training image may be changed."""
    allow_missing: bool = False
    """Train and score without the samples that the store lacks (images set aside), instead of refusing."""

    @model_validator(mode="after")
    def _one_size(self) -> TrainConfig:
        if self.shots is not None and self.fraction < 1:
            problem = f"shots is {self.shots!r} and fraction is {self.fraction!r}; leave one of them out"
            raise ValueError(problem)
        return self


class FoldConfig(Section):
    """One fold of a cross-validation, in place of the data set's own splits (see `pipeline.data.folds`).

    A study with `folds: 5` makes the runs of all folds.
    """

    number: Annotated[int, Field(ge=0)]
    """Which fold is test, counted from 0."""
    of: Annotated[int, Field(ge=2)] = 5
    """How many folds there are."""
    seed: int = 0
    """Another seed draws other folds."""
    val: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the samples outside the fold for val; the rest is train."""


class RayConfig(Section):
    """What `--ray` asks of a cluster: what a worker takes of a node, and how many workers there may be."""

    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a worker; 0.5 shares one between two. Null is 1 where some node has a GPU, else 0."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Processors of a worker; null is a fair share of the node beside each GPU, and 1 without GPUs."""
    min: Positive = 1
    """Workers to ask for even while no node has room for them, so that a cluster that can grow does."""
    max: Positive | None = None
    """Workers at most; null is as many as the nodes have room for."""


class Resources(Section):
    """What a machine offers; no result rests on it, so nothing here is a DVC parameter."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    workers: Positive | None = None
    """Decoding threads; null is one for each processor, at most 16, and 16 where the data are behind a URL."""
    batch_size: Positive | None = None
    """Images per call of the encoder; null finds it out."""
    features: Literal["auto", "device", "host", "stream"] = "auto"
    """Where features wait: on the device, in host memory, or in the store; `auto` goes by their size."""
    channels_last: bool = False
    """Another layout of memory, which some GPUs prefer."""
    compile: bool = False
    """Compile the classifier with torch; takes a minute, and pays on long trainings."""
    tensorboard: bool = False
    """Write the history for TensorBoard too (extra `tensorboard`)."""
    ray: RayConfig = RayConfig()
    """What `--ray` asks of a cluster (extra `ray`)."""


class Config(Section):
    """The whole configuration of an experiment."""

    data: DataConfig
    """Where images and labels are."""
    encoder: EncoderConfig
    """The frozen encoder of stage one."""
    store: StoreConfig
    """Where its features are kept."""
    model: ModelConfig
    """The classifier of stage two."""
    train: TrainConfig
    """How it is trained."""
    run: Local
    """Folder that the training leaves everything in."""
    probe: ProbeConfig = ProbeConfig()
    """What the probe fits."""
    fold: FoldConfig | None = None
    """A fold of a cross-validation to train and test on; null takes the data set's own splits."""
    resources: Resources = Resources()
    """What this machine offers; no result rests on it."""

    @staticmethod
    def fill(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Plain values with what a store answers for, where the data are one: features, encoder, and no backbone."""
        data = values.get("data")
        if not isinstance(data, dict) or data.get("layout") != "store" or "path" not in data:
            return values
        answers: dict[str, dict[str, Any]] = {
            "encoder": {"name": STORED, "checkpoint": ""},
            "store": {"path": data["path"]},
            "model": {"backbone": "none"},
            "train": {},
        }
        given = {key: values.get(key, {}) for key in answers}
        return {**values, **{key: {**answers[key], **of} if isinstance(of, dict) else of for key, of in given.items()}}

    @property
    def reads_store(self) -> bool:
        """Whether a gate, late fusion or an overlay reads a store; `own` makes features from the classifier's own."""
        model = self.model
        return bool(model.fuse or model.overlay) or any(gate.tap != "own" for gate in model.gates)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Args:
        path: YAML 1.2, as DVC reads it: `1e-4` is a number and `yes` a string.
        overrides: Values are YAML too: `train.lr=1e-3`, `model.gates=[]`.

    Raises:
        ConfigError: One line for each problem: file, key, value, what was expected, the nearest valid key.
    """
    values = read_yaml(path)
    parsed = [parse_override(override) for override in overrides]
    for key, value, said in parsed:
        set_key(values, key, value, said)
    return validate(Config, values, str(path), overridden=[key for key, _, _ in parsed])


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as plain JSON values, defaults included."""
    return config.model_dump(mode="json")
