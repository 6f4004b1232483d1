"""The section `model`: the classifier of stage two, and what it does with taps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.schema.section import Fraction, Positive, Section, Seed


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
    min_stability: Fraction = 0.0
    """Leave out masks whose stability is below: how little a mask changes where its threshold does."""
    max_masks: Positive | None = None
    """Paint only so many, those of the highest predicted IoU; null paints all."""


class ClipDemoTraining(Section):
    """How `prepare` trains the miniature CLIP (`clip:demo`, as encoder or as backbone)."""

    images: Positive = 800
    """Images, each shown in two of its flips and turns with a caption."""
    steps: Positive = 160
    """Training steps; more make it better than a demo of learning from few images wants."""
    seed: Seed = 1
    """Of its images, words and weights."""


class ClipConfig(Section):
    """What CLIP is asked, and how much of its image tower may move (`backbone: clip:NAME`)."""

    templates: tuple[str, ...] = ("This is a photo of {class}",)
    """Sentences with `{class}` in them; what the text tower makes of several is averaged."""
    words: dict[str, str] = Field(default_factory=dict)
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
