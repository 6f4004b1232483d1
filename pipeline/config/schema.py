"""The configuration: strict, frozen, and left at the door (models and loops take plain keyword arguments)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.check import validate
from pipeline.config.file import parse_override, read_yaml, set_key


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class SplitRule(Section):
    """Shares of the samples for val and test where the data set has no splits of its own; the rest is train."""

    val: Fraction = 0.15
    test: Fraction = 0.25
    seed: int = 0


class ReadingConfig(Section):
    """How files become uint8 RGB where that is a choice; see `pipeline.data.Reading`."""

    depth: Literal["full", "percentile", "window"] = "full"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    frame: Annotated[int, Field(ge=0)] = 0


class DifficultyConfig(Section):
    """How hard the shape is to see in the demo's images; see `pipeline.data.Difficulty`."""

    shape: Fraction = 0.40
    contrast: tuple[float, float] = (6.0, 17.0)
    speckle: Annotated[float, Field(ge=0)] = 0.33
    structures: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (1, 3)
    radius: tuple[Annotated[float, Field(gt=0, le=0.3)], Annotated[float, Field(gt=0, le=0.3)]] = (0.13, 0.20)


class DemoData(Section):
    """Ultrasound-like images made on the spot (`layout: demo`)."""

    layout: Literal["demo"]
    path: Path
    count: Positive = 360
    size_px: Annotated[int, Field(ge=32)] = 128
    seed: int = 0
    difficulty: DifficultyConfig = DifficultyConfig()


class MedMnistData(Section):
    """An `.npz` file of MedMNIST with its own splits (`layout: medmnist`)."""

    layout: Literal["medmnist"]
    name: str
    path: Path
    size_px: Literal[28, 64, 128, 224] = 28


class FolderData(Section):
    """`root/class/image`, or `root/split/class/image` (`layout: folder`)."""

    layout: Literal["folder"]
    path: Path
    group_pattern: str | None = None
    split: SplitRule = SplitRule()
    reading: ReadingConfig = ReadingConfig()


class CsvData(Section):
    """A table with a row per image (`layout: csv`)."""

    layout: Literal["csv"]
    path: Path | dict[Literal["train", "val", "test"], Path]
    images: Path
    path_column: str
    label_column: str | None = None
    label_columns: tuple[str, ...] = ()
    rest_class: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    suffix: str = ""
    mask_column: str | None = None
    task: Literal["multiclass", "binary", "ordinal", "multilabel"] | None = None
    split: SplitRule = SplitRule()
    reading: ReadingConfig = ReadingConfig()


DataConfig = Annotated[DemoData | MedMnistData | FolderData | CsvData, Field(discriminator="layout")]


class DemoTraining(Section):
    """How `prepare` trains the miniature SAM; 0 steps leave first weights drawn from the seed, of any encoder."""

    images: Positive = 800
    steps: Annotated[int, Field(ge=0)] = 100
    seed: int = 1


class EncoderConfig(Section):
    """The frozen encoder of stage one; `mask` is none: the known mask as a tap (see `pipeline.encoders.known_mask`)."""

    name: Literal["sam_demo", "sam_vit_b", "sam_vit_l", "sam_vit_h", "mask"]
    checkpoint: Path
    taps: tuple[str, ...] = ("patch", "early", "middle", "late", "neck")
    input_px: Positive | None = None
    pool: Positive = 4
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    preprocessing: Literal["sam", "medsam"] = "sam"
    training: DemoTraining = DemoTraining()


class StoreConfig(Section):
    """Where features live, and what their card says of the data: its licence and how to cite it.

    `image_px`, if given, keeps the images there too, at that side: see `pipeline.image_tap`.
    """

    path: Path
    dtype: Literal["float16", "float32"] = "float16"
    image_px: Annotated[int, Field(ge=16, le=4096)] | None = None
    shard_mib: Positive = 64
    license: str = "unknown"
    citation: str = "Cite the data set and the encoder that these features come from."


class Gate(Section):
    """One gate: a tap of the encoder, or `own` for the classifier's own features, onto a stage of the classifier."""

    tap: str
    stage: Literal["stem", "stage1", "stage2", "stage3", "stage4"]


class SlcaConfig(Section):
    """Options of every gate."""

    pool: Positive = 1
    reduction: Positive = 16
    normalise: bool | None = None
    mix: Literal["residual", "multiply"] = "residual"
    gain: Annotated[float, Field(gt=0)] = 1.0
    identity_start: bool = False


class ModelConfig(Section):
    """The classifier of stage two."""

    backbone: str
    weights: str = "none"
    image_px: Annotated[int, Field(ge=16)] = 224
    gates: tuple[Gate, ...] = ()
    slca: SlcaConfig = SlcaConfig()


class AugmentConfig(Section):
    """How far a training image may be changed; nothing by default. Gates follow every change of place.

    `views` are drawn with features of their own, which `encoder.taps` must list (`neck@hflip`).
    """

    flip_horizontal: Fraction = 0.0
    flip_vertical: Fraction = 0.0
    quarter_turns: bool = False
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: Fraction = 0.0
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    noise: Fraction = 0.0
    views: tuple[Literal["hflip", "vflip", "rot90", "rot180", "rot270", "transpose", "transverse"], ...] = ()
    margin: Fraction = 0.0


class TrainConfig(Section):
    """How the classifier is trained; see `pipeline.train.optimise.TrainOptions` for what each key does."""

    epochs: Positive = 100
    batch_size: Positive = 32
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    milestones: tuple[Positive, ...] = ()
    gamma: Annotated[float, Field(gt=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    loss: Literal["auto", "cross_entropy"] = "auto"
    class_weights: Literal["none", "balanced"] = "none"
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    patience: Annotated[int, Field(ge=0)] = 0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    freeze: tuple[Literal["stem", "stage1", "stage2", "stage3", "stage4", "backbone"], ...] = ()
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    augment: AugmentConfig = AugmentConfig()
    allow_missing: bool = False


class Resources(Section):
    """What a machine offers; no result rests on it, so nothing here is a DVC parameter."""

    device: str = "auto"
    workers: Positive | None = None
    batch_size: Positive | None = None
    features: Literal["auto", "device", "host", "stream"] = "auto"
    channels_last: bool = False
    compile: bool = False
    tensorboard: bool = False


class Config(Section):
    """The whole configuration of an experiment."""

    data: DataConfig
    encoder: EncoderConfig
    store: StoreConfig
    model: ModelConfig
    train: TrainConfig
    run: Path
    resources: Resources = Resources()

    @property
    def reads_store(self) -> bool:
        """Whether some gate reads features; `own` makes them from the classifier's own."""
        return any(gate.tap != "own" for gate in self.model.gates)


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
