"""The sections `train`, `probe` and `fold`: how stage two learns, and on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.schema.section import Fraction, Positive, Section, Seed


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
    seed: Seed = 0
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
