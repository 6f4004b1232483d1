"""The sections `encoder` and `store`: what stage one makes of an image, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.schema.section import Fraction, Local, Positive, Section, Seed

STORED = "stored"  # the name of an encoder that only a store knows


class DemoTraining(Section):
    """How `prepare` trains the miniature SAM; 0 steps leave first weights drawn from the seed, of any encoder."""

    images: Positive = 800
    """Images to train the miniature SAM on."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Training steps; 0 draws the weights from the seed instead."""
    seed: Seed = 1
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
    """Size of a file of the largest tap. With masks a file holds 64 images at most, as each takes long."""
    license: str = "unknown"
    """Licence of the data, on the store's card."""
    citation: str = "Cite the data set and the encoder that these features come from."
    """How to cite the data, on the store's card."""
