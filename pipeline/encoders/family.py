"""What a family of encoders must say of itself: the one seam of stage one. Imports no torch.

A family shares an architecture: SAM's ViT, TinyViT, Hiera, CLIP's image towers, and the known mask, which is none.
Asked for by a name, it says before a weight is read what its features are and what they depend on (`Recipe`), and then
encodes (`Encoder`).
A new family is a folder, with one module without torch and one with it, and one line in `FAMILIES`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pipeline import mask_tap
from pipeline.encoders.pooling import Pool
from pipeline.errors import CheckpointError, ConfigError
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

JSON = str | int | float | list["JSON"] | dict[str, "JSON"]
Shape = tuple[int, int, int]
Reads = Literal["image", "mask"]


@dataclass(frozen=True)
class Prepared:
    """One image, resized and ready for a batch.

    Attributes:
        pixels: uint8 (3, S, S), zeros below and to the right of the image; or what another family batches.
        size: Height and width of the image within `pixels`, px.
    """

    pixels: Tensor
    size: tuple[int, int]


class Recipe(Protocol):
    """How features are made, apart from what the encoder has learnt and from the pixels."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (C, h, w) of each tap's map as it is stored, in the order asked for."""

    def fingerprint(self, knows_sha256: str) -> dict[str, JSON]:
        """Everything that the features depend on, apart from the pixels.

        Args:
            knows_sha256: Digest of what the encoder knows: its file of weights, or the masks that it was given.
        """


class Described(Protocol):
    """What its features are, of an encoder that encodes here or elsewhere."""

    @property
    def taps(self) -> Mapping[str, Shape]:
        """Shape (C, h, w) of each tap's map as it is stored."""

    @property
    def reads(self) -> Reads:
        """What it encodes of a sample."""

    def fingerprint(self) -> dict[str, JSON]:
        """Everything that its features depend on, apart from the pixels."""


@runtime_checkable
class Encoder(Described, Protocol):
    """A frozen encoder on its device.

    Attributes:
        input_px: Side S of the square input, px.
    """

    input_px: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Make one sample ready for a batch, on the CPU; safe to call from many threads.

        Args:
            image: What it reads of the sample: uint8 (H, W, 3) RGB, or a mask (H, W).

        Raises:
            DataError: It cannot encode this one.
        """

    def encode(self, pixels: Tensor, sizes: Tensor, dtype: torch.dtype = ...) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            pixels: (B, ...), the `Prepared.pixels` of each sample, on any device.
            sizes: int (n, 2), the `Prepared.size` of each. What follows the n samples in `pixels` fills the batch up to
                its size, on which the last bits depend; what comes of it is nobody's.
            dtype: Type that features are stored in.

        Returns:
            (n, C, h, w) of every tap, of type `dtype`, on the encoder's device.
        """


@dataclass(frozen=True)
class Family:
    """Encoders that share an architecture.

    Attributes:
        names: What configurations call them.
        folder: Its own in this room, with two modules. `recipe` has `make_recipe(name, taps, input_px, pool, precision,
            preprocessing, masks)` and no torch; `encoder` has `build(recipe, checkpoint, device)`, and
            `write_untrained(name, path, generator)` where there are weights.
        reads: What its encoders encode of a sample.
        weights: Module of this room with `weights_file(name, checkpoint)`, `absent(name, checkpoint)` and
            `fetch_weights(name, checkpoint, progress)`: where its files of weights lie; no torch.
        prefix: What other names of its encoders begin with, where a library knows them and not we; empty for none.
        taps: What is kept of its encoders where nobody says what.
    """

    names: tuple[str, ...]
    folder: str
    reads: Reads = "image"
    weights: str = "weight_files"
    prefix: str = ""
    taps: tuple[str, ...] = ("patch", "early", "middle", "late", "neck")


SAM_2 = tuple(
    f"{version}_hiera_{size}" for version in ("sam2.1", "sam2") for size in ("tiny", "small", "base_plus", "large")
)
FAMILIES = (
    Family(("sam_vit_b", "sam_vit_l", "sam_vit_h", "sam_demo"), "sam"),
    Family(("lite_medsam", "mobile_sam"), "tiny_vit"),
    Family(SAM_2, "hiera", weights="hiera.files"),
    Family(("clip:demo",), "clip", weights="clip.files", prefix="clip:", taps=("embedding",)),
    Family(("mask",), "known_mask", reads="mask", taps=("mask",)),
)


def family_of(name: str) -> Family:
    """The family of an encoder.

    Raises:
        ConfigError: There is no encoder of that name.
    """
    for family in FAMILIES:
        if name in family.names or (family.prefix and name.startswith(family.prefix)):
            return family
    valid = [name for family in FAMILIES for name in family.names]
    valid += [f"{family.prefix}NAME" for family in FAMILIES if family.prefix]
    near = difflib.get_close_matches(name, valid, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    message = f"there is no encoder {name!r}; valid encoders: {', '.join(valid)}{meant}"
    raise ConfigError(message)


def make_recipe(
    name: str,
    taps: Sequence[str] | None,
    input_px: int | None = None,
    pool: Pool = 1,
    precision: str = "float32",
    preprocessing: str | None = None,
    masks: Mapping[str, Any] | None = None,
) -> Recipe:
    """How an encoder makes features, checked.

    Args:
        name: Of the encoder.
        taps: What is wanted of it; None for the family's own.
        input_px: Side of the input, px; None is what the encoder was made for.
        pool: Side of the local average: see `pooling.choose_pools`.
        precision: Type of the matrix products.
        preprocessing: Whose; None is what the encoder was made for.
        masks: How the tap `masks` is made, if it is asked for: see `masks.rules.MaskRules`.

    Raises:
        ConfigError: The encoder cannot do what is asked of it; with the valid values.
    """
    family = family_of(name)
    recipe: Recipe = _module(f"{family.folder}.recipe").make_recipe(
        name, family.taps if taps is None else tuple(taps), input_px, pool, precision, preprocessing, masks
    )
    return recipe


def build_encoder(
    name: str,
    *,
    checkpoint: Path | None = None,
    taps: Sequence[str] | None = None,
    input_px: int | None = None,
    pool: Pool = 1,
    precision: str = "float32",
    preprocessing: str | None = None,
    masks: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Encoder:
    """Load a frozen encoder onto a device.

    Args:
        name: Of the encoder, such as `sam_vit_b`.
        checkpoint: File of weights, see `checkpoint.load_encoder`; None for what has none.
        taps: For SAM any of `patch early middle late neck`, `block:N`; of a turned image with `@` and one of `VIEWS`;
            and `masks`, with which `mask_scores` come. None for the family's own.
        input_px: Side of the square input, px; None is what the encoder was made for.
        pool: Side of the local average: see `pooling.choose_pools`.
        precision: Type of the matrix products.
        preprocessing: What the weights were trained with, such as `medsam`; None is what the encoder was made for.
        masks: How the tap `masks` is made, if it is asked for: see `masks.rules.MaskRules`.
        device: As torch names it.

    Raises:
        ConfigError: There is no such encoder, tap, pool, precision, preprocessing or input size.
        CheckpointError: The file is missing or not of this encoder.
    """
    recipe = make_recipe(name, taps, input_px, pool, precision, preprocessing, masks)
    encoder: Encoder = _module(f"{family_of(name).folder}.encoder").build(recipe, checkpoint, device)
    return encoder


def weights_file(name: str, checkpoint: Path) -> Path:
    """The file of weights that `encoder.checkpoint` means to an encoder, there or not."""
    file: Path = _module(family_of(name).weights).weights_file(name, checkpoint)
    return file


def present_weights(name: str, checkpoint: Path) -> Path:
    """The file of weights, which is there.

    Raises:
        CheckpointError: It is not there; the message says how to have it.
    """
    file, family = weights_file(name, checkpoint), _module(family_of(name).weights)
    if not file.is_file():
        message = f"encoder.checkpoint: {family.absent(name, checkpoint)}"
        raise CheckpointError(message)
    _module("weight_files").require_published(checkpoint, file)
    return file


def fetch_weights(name: str, checkpoint: Path, *, progress: Progress = silent) -> Path:
    """Have the file of weights, downloaded and checked if it is a published one that is not here.

    Raises:
        CheckpointError: It cannot be had; the message says which file to put where.
    """
    file: Path = _module(family_of(name).weights).fetch_weights(name, checkpoint, progress=progress)
    return file


def write_untrained_encoder(name: str, path: Path, *, seed: int = 0) -> int:
    """Write a checkpoint of an encoder that has learnt nothing: what is left of it without its weights.

    The miniature SAM starts its training from these very weights. The same seed gives the same file on a CPU.

    Args:
        name: Of the encoder.
        path: Checkpoint to write, in the layout that is read; replaced at once or not at all.
        seed: Of the weights.

    Returns:
        How many parameters it has.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters: int = _module(f"{family_of(name).folder}.encoder").write_untrained(name, path, generator)
    return parameters


def mask_settings(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """How masks were made, from a fingerprint, as `make_recipe` takes it; None where there are none."""
    masks = fields.get("masks")
    return {key: value for key, value in masks.items() if key != "version"} if isinstance(masks, Mapping) else None


def of_taps(fields: Mapping[str, Any], taps: Collection[str]) -> dict[str, Any]:
    """What a fingerprint would be with some of its taps only: whatever it says tap by tap is left to those."""
    by_tap = [field for field in ("taps", "views", "pool") if isinstance(fields.get(field), Mapping)]
    taps = mask_tap.with_scores(taps)
    kept = {**fields, **{field: {tap: said for tap, said in fields[field].items() if tap in taps} for field in by_tap}}
    if not mask_tap.others_of(taps):
        kept.pop("masks", None)  # how masks were made
    elif "pool" in kept and len(mask_tap.others_of(kept["taps"])) == len(kept["taps"]):
        kept["pool"] = {}  # no map is pooled
    return kept


def _module(name: str) -> Any:
    return importlib.import_module(f"pipeline.encoders.{name}")
